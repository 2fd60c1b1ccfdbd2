"""Training data: every source gives the same images with their own labels and captions, in an order that a seed alone decides."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowkit import assets
from flowkit.distill.data import Examples, open_examples, tensors
from flowkit.distill.feed import Feed, Order
from flowkit.eval.decoding import Decoding

COUNT, SIZE = 7, 6
PIXELS = torch.randint(256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = [0, 0, 1, 1, 1, 2, 2]
NAMES = [f"{'abc'[label]}/{index:02}.png" for index, label in enumerate(LABELS)]
CAPTIONS = [f"picture {index} ü" for index in range(COUNT)]
PLAIN = Decoding(size=SIZE)


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[index].permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def files(kind: str) -> dict[str, bytes]:
    """A set of images with labels or captions of a kind, by file name."""
    flat = [f"{index:02}.png" for index in range(COUNT)]
    names = NAMES if kind == "folders" else flat
    found = {name: png(index) for index, name in enumerate(names)}
    beside = {
        "folders": {},
        "txt": {f"{index:02}.txt": caption.encode() for index, caption in enumerate(CAPTIONS)},
        "cls": {f"{index:02}.cls": str(label).encode() for index, label in enumerate(LABELS)},
        "json": {
            f"{index:02}.json": json.dumps({"text": CAPTIONS[index], "label": LABELS[index]}).encode()
            for index in range(COUNT)
        },
        "metadata": {
            "metadata.jsonl": "\n".join(
                json.dumps({"file_name": name, "text": text, "label": label})
                for name, text, label in zip(flat, CAPTIONS, LABELS, strict=True)
            ).encode()
        },
    }
    return found | beside[kind]


def write(where: Path, content: dict[str, bytes], form: str) -> Path:
    """Writes files as a folder, a zip or webdataset shards."""
    if form == "folder":
        for name, value in content.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(value)
        return where
    where.mkdir()
    if form == "zip":
        with zipfile.ZipFile(where / "set.zip", "w") as archive:
            for name, value in content.items():
                archive.writestr(name, value)
        return where / "set.zip"
    for number, inside in enumerate((range(4), range(4, COUNT))):
        with tarfile.open(where / f"part-{number}.tar", "w") as tar:
            for name in (name for name in content if int(name[:2]) in inside):
                member = tarfile.TarInfo(name)
                member.size = len(content[name])
                tar.addfile(member, io.BytesIO(content[name]))
    return where


def pixels(found: Examples) -> Tensor:
    return torch.stack([found[i] for i in range(len(found))])


WANTED = PIXELS / 127.5 - 1


@pytest.mark.parametrize("form", ["folder", "zip", "shards"])
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("folders", "label"), ("cls", "label"), ("json", "label"), ("metadata", "label"),
     ("txt", "caption"), ("json", "caption"), ("metadata", "caption"), ("txt", None)],
)  # fmt: skip
def test_files_come_with_their_own_labels_and_captions(
    tmp_path: Path, form: str, kind: str, wanted: str | None
) -> None:
    if form == "shards" and kind in ("folders", "metadata"):
        form = "zip"  # no layouts of webdataset
    found = open_examples(write(tmp_path / "set", files(kind), form), wanted, PLAIN)
    assert torch.equal(pixels(found), WANTED)
    expected: dict[str | None, Any] = {"label": LABELS, "caption": CAPTIONS, None: None}
    assert found.conditions == expected[wanted]
    assert found.classes == (["a", "b", "c"] if kind == "folders" else None)
    found.check(PLAIN)


def test_shards_are_named_by_folder_pattern_and_braces(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", files("cls"), "shards")
    for name in (folder, folder / "part-*.tar", folder / "part-{0..1}.tar"):
        assert open_examples(str(name), "label", PLAIN).conditions == LABELS
    assert open_examples(folder / "part-1.tar", "label", PLAIN).conditions == LABELS[4:]
    with pytest.raises(FileNotFoundError, match=r"no images at .*part-2\.tar"):
        open_examples(str(folder / "part-{0..2}.tar"), "label", PLAIN)


def test_datasets_by_folder_object_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [Image.open(io.BytesIO(png(index))) for index in range(COUNT)]
    rows = {"image": pictures, "label": LABELS, "text": CAPTIONS}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "text": datasets.Value("string"),
        }
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    for source in (made, tmp_path / "saved", tmp_path / "parquet"):
        found = open_examples(source, "label", PLAIN)
        assert torch.equal(pixels(found), WANTED)
        assert list(found.conditions or ()) == LABELS
        assert found.classes == ["a", "b", "c"]
        assert open_examples(source, "caption", PLAIN).conditions == CAPTIONS
    renamed = made.rename_columns({"text": "words", "image": "photo"})
    assert open_examples(renamed, "caption", PLAIN, condition_column="words").conditions == CAPTIONS
    with pytest.raises(ValueError, match="no column 'caption' among photo, label, words; pass"):
        open_examples(renamed, "caption", PLAIN)
    with pytest.raises(TypeError, match="cannot train on DatasetDict; pass a path"):
        open_examples(datasets.DatasetDict(train=made), "label", PLAIN)


def test_embedded_data_and_arrays(tmp_path: Path) -> None:
    found = open_examples("digits", "label", Decoding(1, 8))
    wanted, labels = assets.images("digits")
    assert torch.equal(pixels(found), wanted / 127.5 - 1)
    assert found.conditions == labels.tolist()
    with pytest.raises(ValueError, match="'digits' has labels and no captions"):
        open_examples("digits", "caption", Decoding(1, 8))
    np.savez(tmp_path / "set.npz", arr_0=PIXELS.permute(0, 2, 3, 1).numpy(), arr_1=np.array(LABELS))
    stored = open_examples(tmp_path / "set.npz", "label", PLAIN)
    assert torch.equal(pixels(stored), WANTED)
    assert stored.conditions == LABELS
    floats = torch.randn(3, 1, 4, 4)
    assert torch.equal(pixels(tensors(floats)), floats)


def test_what_a_training_depends_on_is_in_the_description(tmp_path: Path) -> None:
    content = files("cls")
    before = open_examples(write(tmp_path / "one", content, "folder"), "label", PLAIN).description
    assert before == open_examples(tmp_path / "one", "label", PLAIN).description
    (tmp_path / "one" / "03.cls").write_bytes(b"0")
    assert open_examples(tmp_path / "one", "label", PLAIN).description != before
    (tmp_path / "one" / "06.png").unlink()
    assert open_examples(tmp_path / "one", None, PLAIN).description["count"] == COUNT - 1


def test_bad_data_is_named_with_the_cure(tmp_path: Path) -> None:
    content = files("txt")
    folder = write(tmp_path / "set", content, "folder")
    with pytest.raises(ValueError, match=r"00\.png has no label; put each class into a folder of its own"):
        open_examples(folder, "label", PLAIN)
    (folder / "03.txt").unlink()
    with pytest.raises(ValueError, match=r"03\.png has no caption; put it into NAME\.txt"):
        open_examples(folder, "caption", PLAIN)
    (folder / "05.png").write_bytes(png(5)[:20])
    found = open_examples(folder, None, PLAIN)
    with pytest.raises(ValueError, match=r"05\.png is broken or no image .*copy it again or remove it"):
        found.check(PLAIN)
    with pytest.raises(ValueError, match=r"05\.png is broken"):
        _ = found[5]
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a"}\n{"text": "b"}')
    with pytest.raises(ValueError, match=r'line 2 of .*metadata\.jsonl has no "file_name"'):
        open_examples(folder, "caption", PLAIN)
    mixed = write(tmp_path / "mixed", files("cls") | {"02.cls": b"cat"}, "folder")
    with pytest.raises(ValueError, match=r"labels are names \('cat'\) and numbers \(0\)"):
        open_examples(mixed, "label", PLAIN)
    with pytest.raises(FileNotFoundError, match="no images at /nowhere"):
        open_examples("/nowhere", None, PLAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there are no images in .*empty; check the path"):
        open_examples(tmp_path / "empty", "label", PLAIN)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(ImportError, match=r"pip install 'flowkit-diffusion\[data\]'"):
        open_examples("someone/pictures", "label", PLAIN)
    with pytest.raises(ImportError, match=r"has braces: pip install 'flowkit-diffusion\[data\]'"):
        open_examples(str(tmp_path / "{0..1}.tar"), "label", PLAIN)


# -------------------------------------------------------------------------------------------------------------- the order


def test_each_epoch_is_a_new_permutation_and_so_are_its_flips() -> None:
    count, batch = 12, 8
    order = Order(count, batch, 0, flip=True)
    seen = [pair for step in range(9) for pair in zip(*order(step, range(batch)), strict=True)]
    epochs = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert all(sorted(i for i, _ in epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 6
    assert 20 < sum(flip for _, flip in seen) < 52
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 6  # an image is mirrored in some and not in others
    plain = Order(count, batch, 0, flip=False)
    assert [i for step in range(9) for i in plain(step, range(batch))[0]] == [i for i, _ in seen]
    assert Order(count, batch, 1, flip=False)(0, range(batch))[0] != plain(0, range(batch))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_do_not_depend_on_who_asks_or_where_it_starts(workers: int) -> None:
    examples = tensors(PIXELS, LABELS)
    whole = Feed(examples, 4, 5, [range(4)], flip=True)
    expected = [whole(step, range(4)) for step in range(6)]
    halves = [
        Feed(examples, 4, 5, [range(2 * p, 2 * p + 1), range(2 * p + 1, 2 * p + 2)], flip=True, workers=workers)
        for p in (0, 1)
    ]
    for start in (0, 4, 2):  # and anew at another update, as after a stop
        for step in range(start, start + 2):
            rows = [halves[row // 2](step, range(row, row + 1)) for row in range(4)]
            for place in (0, 1):
                assert torch.equal(torch.cat([row[place] for row in rows]), expected[step][place])
    before = torch.random.get_rng_state()
    whole(0, range(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for feed in halves:
        feed.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_met_while_training_is_named(tmp_path: Path, workers: int) -> None:
    folder = write(tmp_path / "set", files("cls") | {"05.png": b"junk"}, "folder")
    feed = Feed(open_examples(folder, "label", PLAIN), COUNT, 0, [range(COUNT)], workers=workers)
    with pytest.raises(ValueError, match=rf"^{folder}{os.sep}05\.png is broken or no image"):
        feed(0, range(COUNT))
    large = Image.new("RGB", (9, 9))
    large.save(folder / "05.png")
    feed = Feed(open_examples(folder, "label", Decoding()), COUNT, 0, [range(COUNT)], workers=workers)
    with pytest.raises(ValueError, match=r"different shapes, \(3, 6, 6\) and \(3, 9, 9\); pass size="):
        feed(0, range(COUNT))
