"""Images from every kind of source: the same pixels, in one order, and what is odd is refused by name with the cure."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flowkit.eval.images import Images, images, to_uint8

COUNT = 7
PIXELS = torch.randint(256, (COUNT, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
# Sorted by relative path, which is neither the order of writing nor that of the folders' listing.
NAMES = ["a/0.png", "a/1.PNG", "a/b/0.png", "c.png", "d/0.png", "d/10.png", "d/9.png"]


def png(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def content(index: int) -> bytes:
    return png(PIXELS[index].permute(1, 2, 0).contiguous())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("images")
    extra = {"a/0.txt": b"label", ".hidden.png": b"", "__MACOSX/a/0.png": b"junk", "a/.DS_Store.png": b"junk"}
    files = {name: content(index) for index, name in enumerate(NAMES)} | extra
    shuffled = sorted(files, key=lambda name: zlib.crc32(name.encode()))
    for name in shuffled:
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(files[name])
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name in shuffled:
            archive.writestr(name, files[name])
    with tarfile.open(root / "images.tar", "w") as tar:
        for name in shuffled:
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    np.savez(root / "nhwc.npz", PIXELS.permute(0, 2, 3, 1).numpy(), np.arange(COUNT))
    np.savez(root / "nchw.npz", samples=PIXELS.numpy(), labels=np.arange(COUNT))
    return {path.name: path for path in root.iterdir()}


class Items(Dataset[Any]):
    def __init__(self, form: str) -> None:
        self.form = form

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        x = PIXELS[index]
        picture = Image.fromarray(x.permute(1, 2, 0).numpy())
        return {"tensor": x, "pair": (x, 3), "picture": {"label": 1, "image": picture}, "float": x / 255}[self.form]


def read(found: Images, size: int = 3, **options: int) -> Tensor:
    blocks = list(found.blocks(size, **options))
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert all(block.dtype == torch.uint8 for block in blocks)
    return torch.cat(blocks)


@pytest.mark.parametrize("name", ["folder", "images.zip", "images.tar", "nhwc.npz", "nchw.npz"])
def test_files_are_read_in_the_order_of_their_paths(places: dict[str, Path], name: str) -> None:
    found = images(places[name])
    assert len(found) == found.description["count"] == COUNT
    assert found.description["path"] == str(places[name])
    assert torch.equal(read(found), PIXELS)
    assert torch.equal(found[5], PIXELS[5])
    assert torch.equal(read(found, start=2, stop=6), PIXELS[2:6])
    assert torch.equal(read(images(places[name], count=4)), PIXELS[:4])
    with pytest.raises(IndexError, match="image 7 of 7"):
        found[7]
    with pytest.raises(ValueError, match="count=8 images are asked for, there are 7"):
        images(places[name], count=8)
    with pytest.raises(ValueError, match="images up to 9 are asked for, there are 7"):
        list(found.blocks(2, stop=9))


def test_links_are_followed_and_do_not_change_the_order(places: dict[str, Path], tmp_path: Path) -> None:
    """torch-fidelity sorts by where links lead."""
    for index, target in enumerate(reversed(NAMES)):
        (tmp_path / f"{index}.png").symlink_to(places["folder"] / target)
    assert torch.equal(read(images(tmp_path)), PIXELS.flip(0))


def test_archives_can_be_read_by_many_threads_and_after_pickling(places: dict[str, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for name in ("images.zip", "images.tar"):
        found = images(places[name])
        with ThreadPoolExecutor(4) as pool:
            read_back = list(pool.map(lambda i, found=found: found[i % COUNT], range(60)))
        assert torch.equal(torch.stack(read_back[:COUNT]), PIXELS)
        assert all(torch.equal(image, PIXELS[i % COUNT]) for i, image in enumerate(read_back))
    from flowkit.eval.archives import _Handles

    assert pickle.loads(pickle.dumps(_Handles(places["images.zip"]))).zip().namelist()


@pytest.mark.parametrize(
    "source",
    [PIXELS, PIXELS.numpy(), PIXELS.permute(0, 2, 3, 1).numpy(), Items("tensor"), Items("pair"), Items("picture")],
    ids=["tensor", "array", "NHWC", "dataset", "pairs", "pictures"],
)
def test_arrays_and_datasets(source: Any) -> None:
    found = images(source)
    assert len(found) == COUNT
    assert torch.equal(read(found), PIXELS)
    assert torch.equal(found[4], PIXELS[4])


def test_functions_need_a_count() -> None:
    assert torch.equal(read(images(lambda index: PIXELS[index], count=COUNT)), PIXELS)
    with pytest.raises(ValueError, match="a function of an index has no end; pass count="):
        images(lambda index: PIXELS[index])


def test_batches_are_cut_into_blocks() -> None:
    def batches() -> Iterator[Tensor]:
        yield from PIXELS.split([1, 4, 2])

    found = images(batches())
    assert found.count is None
    with pytest.raises(TypeError, match="number of these images is not known"):
        len(found)
    with pytest.raises(TypeError, match="read once, in order"):
        found[0]
    assert torch.equal(read(found), PIXELS)
    assert torch.equal(read(images(batches()), start=2, stop=6), PIXELS[2:6])
    assert torch.equal(read(images(batches(), count=COUNT), size=100), PIXELS)
    assert torch.equal(read(images(batches(), count=4)), PIXELS[:4])
    loader = images(DataLoader(TensorDataset(PIXELS, torch.arange(COUNT)), batch_size=2))
    assert torch.equal(read(loader), PIXELS)
    assert torch.equal(read(loader), PIXELS)  # a loader can be read again
    with pytest.raises(ValueError, match="the images ended after 7, 8 were promised"):
        read(images(batches(), count=8))
    with pytest.raises(ValueError, match="the images ended after 7, 9 were promised"):
        read(images(batches()), stop=9)
    with pytest.raises(ValueError, match=r"the batch from image 7 is of shape \(3, 9, 9\)"):
        read(images([PIXELS, torch.zeros(1, 3, 9, 9, dtype=torch.uint8)]))


def test_floats_are_rounded_half_to_even_in_their_declared_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255, (0, 1)), levels)
    assert torch.equal(to_uint8(levels.double() / 127.5 - 1, (-1, 1)), levels)
    halves = torch.tensor([0.5, 1.5, 2.5, 253.5, 254.5], dtype=torch.float64) / 255
    assert to_uint8(halves, (0, 1)).tolist() == [0, 2, 2, 254, 254]
    assert to_uint8(halves, (0, 1), "truncate").tolist() == [0, 1, 2, 253, 254]
    x = torch.linspace(-1, 1, 999)
    assert torch.equal(to_uint8(x, (-1, 1), "truncate"), (x * 127.5 + 128).clip(0, 255).to(torch.uint8))
    # diffusers' rule.
    assert torch.equal(to_uint8(x, (-1, 1)), ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    assert torch.equal(read(images(Items("float"), value_range=(0, 1))), PIXELS)
    assert torch.equal(read(images([PIXELS / 127.5 - 1], value_range=(-1, 1))), PIXELS)
    assert to_uint8(torch.ones(1, dtype=torch.bfloat16), (0, 1)).item() == 255


def test_floats_are_refused_where_their_meaning_is_open() -> None:
    """torch-fidelity takes uint8 only; here the range is asked for, and checked."""
    with pytest.raises(ValueError, match=r"image 0 is torch.float32; say what black and white are: value_range"):
        images(Items("float"))[0]
    x = torch.tensor([[-0.5, 1.2]])
    with pytest.raises(
        ValueError, match=r"values from -0.5 to 1.2, outside 0 ... 1; check value_range, or pass clip=True"
    ):
        to_uint8(x, (0, 1))
    assert to_uint8(x, (0, 1), clip=True).tolist() == [[0, 255]]
    assert to_uint8(torch.tensor([1 + 1e-6]), (0, 1)).tolist() == [255]
    with pytest.raises(ValueError, match="holds NaN"):
        to_uint8(torch.tensor([float("nan")]), (0, 1), clip=True)
    with pytest.raises(TypeError, match=r"torch.int64; images are uint8"):
        to_uint8(torch.tensor([3]))


# Odd files. All lie in one folder, so that the name in the message is the file's.


def deep_colour() -> bytes:
    """A PNG of 16 bits a channel in colour, which PIL cannot write: 1x1, (65535, 0, 300)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 0, 300))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGBA = np.array([[[200, 100, 0, 128], [10, 20, 30, 255]]], np.uint8)
DEEP = np.array([[0, 128, 129, 32768, 65535]], np.uint16)
FRAMES = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
ODD: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "empty": (b"", {}, "is broken or no image"),
    "text": (b"not an image", {}, "is broken or no image"),
    "cut": (png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:-600], {}, "is broken or no image"),
    "alpha": (png(RGBA), {}, "is partly transparent; pass alpha='white' or 'black' for the ground, or 'drop'"),
    "deep": (png(DEEP), {}, "has 16 bits a channel; pass deep='scale'"),
    "colour": (deep_colour(), {"deep": "scale"}, "has 16 bits a channel in colour"),
    "cmyk": (saved(Image.new("CMYK", (2, 2)), "JPEG"), {}, "is of PIL's mode CMYK"),
    "float": (saved(Image.new("F", (2, 2)), "TIFF"), {}, "is of PIL's mode F"),
    "moving": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), {}, "is an animation of 2 frames"),
    "rgb": (png(RGBA[..., :3]), {"channels": 1}, "is in colour where channels=1"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data, options, message = ODD[name]
    (tmp_path / f"{name}.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        images(tmp_path, **options)[0]
    assert str(caught.value).startswith(str(tmp_path / f"{name}.png"))
    assert "\n" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr(f"sub/{name}.png", data)
    with pytest.raises(ValueError, match=rf"odd.zip: sub/{name}.png .*{message[3:20]}"):
        images(tmp_path / "odd.zip", **options)[0]


def one(tmp_path: Path, data: bytes, **options: Any) -> list[Any]:
    (tmp_path / "one.png").write_bytes(data)
    return images(tmp_path, **options)[0].permute(1, 2, 0).tolist()


def test_transparent_images_are_composed_as_asked(tmp_path: Path) -> None:
    assert one(tmp_path, png(RGBA), alpha="drop") == [[[200, 100, 0], [10, 20, 30]]]
    assert one(tmp_path, png(RGBA), alpha="black") == [[[100, 50, 0], [10, 20, 30]]]
    assert one(tmp_path, png(RGBA), alpha="white") == [[[227, 177, 127], [10, 20, 30]]]
    assert one(tmp_path, png(RGBA[:, 1:])) == [[[10, 20, 30]]]  # opaque: nothing to choose


def test_greyscale_palette_bits_and_depth(tmp_path: Path) -> None:
    grey = np.array([[0, 7, 255]], np.uint8)
    assert one(tmp_path, png(grey)) == [[[0] * 3, [7] * 3, [255] * 3]]
    assert one(tmp_path, png(grey), channels=1) == [[[0], [7], [255]]]
    assert one(tmp_path, png(np.repeat(grey[..., None], 3, 2)), channels=1) == [[[0], [7], [255]]]
    assert one(tmp_path, saved(Image.fromarray(grey > 6), "PNG")) == [[[0] * 3, [255] * 3, [255] * 3]]
    palette = Image.fromarray(RGBA[..., :3]).quantize(2)
    assert one(tmp_path, saved(palette, "PNG")) == [[[200, 100, 0], [10, 20, 30]]]
    assert one(tmp_path, png(DEEP), deep="scale", channels=1) == [[[0], [0], [1], [128], [255]]]


def test_mixed_sizes_are_refused_by_name_and_brought_to_one(tmp_path: Path) -> None:
    for name, size in (("a", (8, 8)), ("b", (8, 8)), ("c", (8, 12))):
        (tmp_path / f"{name}.png").write_bytes(png(np.zeros((*size, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"c.png is of shape \(3, 8, 12\), those before of \(3, 8, 8\); pass size="):
        list(images(tmp_path).blocks(2))
    assert torch.cat(list(images(tmp_path, size=4).blocks(2))).shape == (3, 3, 4, 4)


def test_size_is_pils_bicubic_of_the_middle(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (20, 31, 3), np.uint8)
    (tmp_path / "one.png").write_bytes(png(array))
    # Rows first, see flowkit.eval.resize.pil_bicubic.
    rows = Image.fromarray(array).resize((15, 20), Image.Resampling.BICUBIC)
    expected = np.array(rows.resize((15, 10), Image.Resampling.BICUBIC))[:, 2:12]
    assert np.array_equal(images(tmp_path, size=10)[0].permute(1, 2, 0), expected)


def test_sources_and_options_that_do_not_fit_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (3, {}, TypeError, "cannot read images from int; pass a path"),
        (tmp_path / "gone", {}, FileNotFoundError, "no images at .*gone"),
        (tmp_path, {}, ValueError, "there are no images in .*; check the path"),
        (places["folder"], {"value_range": (0, 1)}, ValueError, "are for floats, and .* holds bytes"),
        (places["folder"], {"alpha": "red"}, ValueError, "unknown alpha 'red'; choose refuse, white"),
        (places["folder"], {"deep": "clip"}, ValueError, "unknown deep 'clip'"),
        (places["folder"], {"channels": 4}, ValueError, "got channels=4"),
        (PIXELS, {"size": 4}, ValueError, "size=4 is for image files, the source is of kind tensor"),
        (PIXELS, {"rounding": "up"}, ValueError, "got rounding='up'"),
        (PIXELS, {"value_range": (0, 255)}, ValueError, r"value_range=\(0, 255\); choose"),
        (PIXELS[:, 0], {}, ValueError, r"the batch is of shape \(7, 6, 5\)"),
    ]
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            images(source, **options)
    with pytest.raises(ValueError, match="got size=0"):
        list(images(PIXELS).blocks(0))


def test_broken_archives_are_named(tmp_path: Path) -> None:
    for name, message in (("a.zip", "no zip file"), ("a.tar", "no uncompressed tar"), ("a.npz", "not a plain .npz")):
        (tmp_path / name).write_bytes(b"junk" * 300)
        with pytest.raises(ValueError, match=rf"{name} .*{message}"):
            images(tmp_path / name)
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read images from .*a.rar; use a folder"):
        images(tmp_path / "a.rar")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"must hold one array of images, uint8 with four axes \(found: mu float64 \(3,\)\)"
    ):
        images(tmp_path / "mu.npz")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("x.png", content(0))
    damaged = bytearray((tmp_path / "b.zip").read_bytes())
    damaged[60] ^= 255
    (tmp_path / "b.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"b.zip: x.png cannot be read"):
        images(tmp_path / "b.zip")[0]
