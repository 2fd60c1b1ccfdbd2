"""``flowkit sample``: from models and inputs to folders of samples, whatever the batch, the processes and the moment of a kill."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import flowkit
from flowkit import Grid, RectifiedFlowScheduler, rng
from flowkit.cli import app, media, options
from flowkit.cli import sample as command
from flowkit.eval.pictures import mosaic, picture
from flowkit.pipelines import loading

from . import tiny

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ("digits", "--labels", "0-9", "--steps", "2")


def invoke(*arguments: object, code: int = 0) -> str:
    """Runs ``flowkit sample``; returns its closing line, or that of its error."""
    result = CliRunner().invoke(app, ["sample", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    *_, last = (result.stdout if code == 0 else result.stderr).splitlines()
    return last


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder: Path) -> np.ndarray[Any, Any]:
    """The PNGs of a folder, (N, H, W) or (N, H, W, C)."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def settings(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "sample.json").read_text())
    return values


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny random pipelines."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            flow = family in ("sd3", "flux")
            knobs = {} if flow else {"clip_sample": False, "steps_offset": 1}
            scheduler = (FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler)(**knobs)
            made[family] = tmp_path_factory.mktemp(family) / family
            tiny.build(family, scheduler).save_pretrained(made[family])
        return made[family]

    return folder


# The embedded models, from end to end.


def test_digits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = invoke(*DIGITS, "--output", out, "--count", 12, "--seed", 5, "--batch-size", 8)
    assert re.fullmatch(rf"12 images in {out} \(12 drawn in .* a second\); overview: {out}/overview.png", line)
    names = {f"{i:06d}.png" for i in range(12)}
    assert set(contents(out)) == names | {"overview.png", "sample.json"}

    pipe: Any = flowkit.load_demo("digits")
    generators = [torch.Generator().manual_seed(rng.sample_seed(5, i)) for i in range(12)]
    labels = [i % 10 for i in range(12)]
    expected = pipe(labels, num_inference_steps=2, generator=generators, output_type="pt").images
    assert np.abs(pixels(out) / 255 - expected[:, 0].numpy()).max() < 1.1 / 255

    said = settings(out)
    assert said["samples"][11] == {"index": 11, "seed": rng.sample_seed(5, 11), "class_labels": 1}
    assert (said["model"], said["pipeline"], said["dtype"]) == ("digits", "ClassConditionalPipeline", "float32")
    assert said["call"] == {"num_inference_steps": 2}
    assert said["scheduler"]["solver"] == "unipc"
    assert said["scheduler"]["config"]["noise"] == "keyed"
    assert str(tmp_path) not in json.dumps(said)
    note = json.loads(Image.open(out / "000011.png").text["flowkit"])  # type: ignore[attr-defined]
    assert note.items() >= {"index": 11, "seed": rng.sample_seed(5, 11), "class_labels": 1, "solver": "unipc"}.items()
    assert Image.open(out / "overview.png").size == (8 * 132 - 4, 2 * 132 - 4)


def test_samples_do_not_depend_on_batch_or_start(tmp_path: Path) -> None:
    invoke(*DIGITS, "--output", tmp_path / "whole", "--count", 12, "--batch-size", 12)
    invoke(*DIGITS, "--output", tmp_path / "single", "--count", 12, "--batch-size", 1)
    invoke(*DIGITS, "--output", tmp_path / "part", "--count", 3, "--start", 7)
    whole = pixels(tmp_path / "whole").astype(int)
    assert np.abs(pixels(tmp_path / "single") - whole).max() <= 1
    assert sorted(p.name for p in (tmp_path / "part").glob("0*")) == ["000007.png", "000008.png", "000009.png"]
    assert np.abs(pixels(tmp_path / "part") - whole[7:10]).max() <= 1
    assert np.abs(whole[0] - whole[10]).max() > 10  # the same label, another sample
    invoke(*DIGITS, "--output", tmp_path / "other", "--count", 12, "--seed", 1)
    assert np.abs(pixels(tmp_path / "other") - whole).max() > 10


def test_npz_has_the_layout_of_evaluators(tmp_path: Path) -> None:
    call = ("shapes", "--labels", "3,0-1", "--steps", "2", "--count", "7", "--batch-size", "3")
    invoke(*call, "--output", tmp_path / "png")
    invoke(*call, "--output", tmp_path / "npz", "--format", "npz")
    assert set(contents(tmp_path / "npz")) == {"samples.npz", "overview.png", "sample.json"}
    with np.load(tmp_path / "npz" / "samples.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pixels(tmp_path / "png"))
        assert archive["arr_1"].tolist() == [3, 0, 1, 3, 0, 1, 3]
    assert (tmp_path / "npz" / "overview.png").read_bytes() == (tmp_path / "png" / "overview.png").read_bytes()
    before = contents(tmp_path / "npz")
    assert "all were there already" in invoke(*call, "--output", tmp_path / "npz", "--format", "npz")
    assert contents(tmp_path / "npz") == before


# Sampler options.


def test_scheduler_options_reach_the_scheduler(tmp_path: Path) -> None:
    Grid((1.0, 0.4, 0.0), about={"why": "a test"}).save(tmp_path / "grid.json")
    cases: dict[str, tuple[str, ...]] = {
        "plain": ("--steps", "2"),
        "heun": ("--steps", "2", "--solver", "heun"),
        "shift": ("--steps", "2", "--shift", "3"),
        "knob": ("--steps", "2", "--knob", "shift=3.0"),
        "file": ("--grid", str(tmp_path / "grid.json")),
        "keep": ("--steps", "2", "--scheduler", "keep"),
        "stock": ("--steps", "2", "--scheduler", "FlowMatchEulerDiscreteScheduler"),
        "stock shift": ("--steps", "2", "--scheduler", "FlowMatchEulerDiscreteScheduler", "--shift", "3"),
        "guidance": ("--steps", "2", "--guidance", "3"),
        "arg": ("--steps", "2", "--arg", "guidance_scale=3"),
        "sigmas": ("--arg", "sigmas=[1.0, 0.4]"),
    }
    images = {}
    for name, given in cases.items():
        invoke("digits", "--labels", "0-2", *given, "--output", tmp_path / name)
        images[name] = pixels(tmp_path / name).astype(int)
    equal = [{"plain", "keep"}, {"shift", "knob"}, {"guidance", "arg"}, {"file", "sigmas"}]
    for first in images:
        for second in images:
            same = first == second or any({first, second} <= group for group in equal)
            assert (np.abs(images[first] - images[second]).max() <= 1) == same, (first, second)
    said = {name: settings(tmp_path / name) for name in cases}
    assert said["heun"]["scheduler"]["solver"] == "heun"
    assert said["file"]["call"] == {"num_inference_steps": 2}
    assert said["file"]["scheduler"]["config"]["grid"]["sigmas"] == [1.0, 0.4, 0.0]
    assert said["stock shift"]["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert said["stock shift"]["scheduler"]["config"]["shift"] == 3.0
    assert said["keep"]["scheduler"]["config"]["noise"] == "diffusers"


def test_our_scheduler_and_grid_come_back_from_a_stock_folder(
    tmp_path: Path,
) -> None:
    grid = Grid((1.0, 0.7, 0.2, 0.0))
    for name, pipe in (
        ("digits", flowkit.load_demo("digits")),
        ("sd3", tiny.build("sd3", FlowMatchEulerDiscreteScheduler())),
    ):
        pipe.scheduler = RectifiedFlowScheduler(solver="heun", grid=grid)
        flowkit.save_pretrained(pipe, tmp_path / name)
        inputs = (
            ("--labels", "4") if name == "digits" else ("--prompt", "a cat", "--arg", "height=16", "--arg", "width=16")
        )
        for choice in ("flowkit", "keep"):
            out = tmp_path / f"{name} {choice}"
            invoke(tmp_path / name, *inputs, "--scheduler", choice, "--output", out)
            said = settings(out)
            assert said["scheduler"]["solver"] == "heun"
            assert said["scheduler"]["config"]["grid"]["sigmas"] == list(grid.sigmas)
            assert said["call"]["num_inference_steps"] == 3
        line = invoke(tmp_path / name, *inputs, "--steps", 5, "--output", tmp_path / "no", code=2)
        assert line.startswith("error: 5 steps are asked for, and the grid has 3; leave out the number")
        invoke(tmp_path / name, *inputs, "--steps", 2, "--grid", "uniform", "--output", tmp_path / f"{name} uniform")


def test_eta_goes_where_it_is_taken(tmp_path: Path, models: Callable[[str], Path]) -> None:
    images = {}
    for name, given in {
        "none": (),
        "zero": ("--eta", "0"),
        "one": ("--eta", "1"),
        "stock": ("--eta", "1", "--scheduler", "keep"),
    }.items():
        invoke(models("sd15"), "--prompt", "a cat", "--steps", 4, *given, "--output", tmp_path / name)
        images[name] = pixels(tmp_path / name).astype(int)
    assert np.array_equal(images["none"], images["zero"])
    assert not np.array_equal(images["none"], images["one"])
    assert not np.array_equal(images["stock"], images["one"])  # another source of noise
    line = invoke(*DIGITS, "--eta", 1, "--scheduler", "keep", "--output", tmp_path / "no", code=2)
    assert line.startswith("error: ClassConditionalPipeline takes no eta")


# Diffusers folders.


def test_text_to_image(tmp_path: Path, models: Callable[[str], Path]) -> None:
    text = ("--negative-prompt", "a dog", "--guidance", "4", "--steps", "3", "--scheduler", "keep")
    invoke(models("sd15"), "--prompt", "a cat", "--prompt", "a hat", *text, "--count", 3, "--output", tmp_path / "a")
    pipe = tiny.build("sd15", DDIMScheduler(clip_sample=False, steps_offset=1))
    expected = pipe(
        ["a cat", "a hat", "a cat"],
        negative_prompt=["a dog"] * 3,
        guidance_scale=4.0,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(rng.sample_seed(0, i)) for i in range(3)],
        output_type="np",
    ).images
    assert np.abs(pixels(tmp_path / "a") / 255 - expected).max() < 1.1 / 255

    lines = [
        {"prompt": "a cat", "guidance_scale": 4.0},
        {"prompt": "a hat", "guidance_scale": 4.0, "negative_prompt": "a dog"},
        {"prompt": "a cat", "guidance_scale": 1.0},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n\n" for line in lines))
    invoke(models("sd15"), "--prompts", file, *text[:2], "--guidance", "7", *text[4:], "--output", tmp_path / "b")
    one, other = pixels(tmp_path / "a").astype(int), pixels(tmp_path / "b").astype(int)
    assert np.abs(one[:2] - other[:2]).max() <= 1
    assert np.abs(one[2] - other[2]).max() > 1
    assert settings(tmp_path / "b")["samples"][2]["guidance_scale"] == 1.0

    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  a hat \n", encoding="utf-8")
    invoke(models("sd15"), "--prompts", file, *text, "--count", 3, "--output", tmp_path / "c")
    assert np.array_equal(pixels(tmp_path / "c"), pixels(tmp_path / "a"))


def test_image_to_image(tmp_path: Path, models: Callable[[str], Path]) -> None:
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "grey.png")
    call = ("--prompt", "a cat", "--prompt", "a hat", "--steps", 4, "--arg", f"image={tmp_path / 'grey.png'}")
    for family in ("sd15", "sd3"):
        for strength in ("0.3", "0.9"):
            out = tmp_path / f"{family} {strength}"
            invoke(models(family), *call, "--arg", f"strength={strength}", "--output", out)
        assert settings(out)["pipeline"].endswith("Img2ImgPipeline")
        weak, strong = (pixels(tmp_path / f"{family} {strength}").astype(int) for strength in ("0.3", "0.9"))
        assert not np.array_equal(weak, strong)
    line = invoke(models("dit"), "--labels", 1, *call[-2:], "--output", tmp_path / "no", code=2)
    assert line == "error: DiTPipeline takes no image, and diffusers has no sibling of it that does"


def test_labels_and_no_inputs(tmp_path: Path, models: Callable[[str], Path]) -> None:
    invoke(models("dit"), "--labels", "7,3", "--steps", 2, "--guidance", 2, "--output", tmp_path / "dit")
    assert pixels(tmp_path / "dit").shape[0] == 2
    invoke(models("ddpm"), "--steps", 2, "--count", 3, "--output", tmp_path / "ddpm")
    assert pixels(tmp_path / "ddpm").shape == (3, 8, 8, 3)
    assert invoke(models("ddpm"), "--steps", 2, "--output", tmp_path / "one").startswith("1 image in")
    assert len(pixels(tmp_path / "one")) == 1


def test_dtypes(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    pipe = flowkit.load_demo("digits").to(torch.float16)
    pipe.save_pretrained(folder)
    assert loading.saved_dtype(folder) == torch.float16
    assert loading.load(loading.find(str(folder))).dtype == torch.float16
    assert loading.load(loading.find("digits")).dtype == torch.float32
    flowkit.load_demo("shapes").save_pretrained(tmp_path / "single")
    assert loading.saved_dtype(tmp_path / "single") == torch.float32
    for dtype, found in (("auto", "float32"), ("bfloat16", "bfloat16")):
        invoke(folder, *DIGITS[1:], "--dtype", dtype, "--output", tmp_path / dtype)
        assert settings(tmp_path / dtype)["dtype"] == found
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    line = invoke(tmp_path / "variant", *DIGITS[1:], "--output", tmp_path / "no", code=2)
    assert "diffusion_pytorch_model.safetensors" in line
    invoke(tmp_path / "variant", *DIGITS[1:], "--variant", "fp16", "--output", tmp_path / "fp16")
    assert np.array_equal(pixels(tmp_path / "fp16"), pixels(tmp_path / "auto"))


def cached(cache: Path, name: str, source: Path) -> None:
    """Puts a folder into a cache of the hub, as a download would."""
    home = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(source)


def test_hub_models_come_from_the_cache(
    tmp_path: Path, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "cache", "someone/tiny", models("ddpm"))
    flowkit.load_demo("shapes").save_pretrained(tmp_path / "ours")  # its index names classes of flowkit
    cached(tmp_path / "cache", "someone/ours", tmp_path / "ours")
    invoke("someone/tiny", "--steps", 2, "--output", tmp_path / "tiny")
    assert settings(tmp_path / "tiny")["revision"] == "0123456789abcdef0123456789abcdef01234567"
    invoke("someone/ours", "--steps", 2, "--labels", 0, "--output", tmp_path / "our samples")
    assert settings(tmp_path / "our samples")["pipeline"] == "ClassConditionalPipeline"
    line = invoke("someone/else", "--output", tmp_path / "no", code=2)
    assert line == (
        "error: the model someone/else is neither a folder here nor in the cache, and was not fetched: the hub is switched off "
        "here (HF_HUB_OFFLINE); check the name, go online, or pass a folder"
    )


# Video and sound.


@dataclass
class Frames(BaseOutput):
    frames: Any


@dataclass
class Audios(BaseOutput):
    audios: Any


class Drawn(DiffusionPipeline):
    """What its generators draw."""

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def draw(self, generator: list[torch.Generator], *shape: int) -> Tensor:
        with self.progress_bar(total=2) as bar:
            bar.update(2)
        return torch.stack([torch.rand(shape, generator=g) for g in generator])


class VideoPipeline(Drawn):
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int = 5,
        generator: list[torch.Generator] | None = None,
        output_type: str = "np",
    ) -> Frames:
        assert generator is not None
        frames = self.draw(generator, num_frames, 3, 8, 12)
        return Frames(frames if output_type == "pt" else frames.movedim(-3, -1).numpy())


class SoundPipeline(Drawn):
    vocoder = SimpleNamespace(sampling_rate=8000)

    def __call__(
        self, prompt: str | list[str], audio_length_in_s: float = 0.5, generator: list[torch.Generator] | None = None
    ) -> Audios:
        assert generator is not None
        return Audios((self.draw(generator, int(audio_length_in_s * 8000)) * 2 - 1).numpy())


MP4 = b"\0\0\0\x0cftypisom" + b"\0\0\0\x01mdat\0\0\0\0\0\0\0\x14abcd" + b"\0\0\0\x0cmoovabcd"


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Drawn]], Path]:
    """Folders of pipelines that diffusers does not have."""

    def folder(kind: type[Drawn]) -> Path:
        monkeypatch.setattr(diffusers, kind.__name__, kind, raising=False)
        pipe = kind(tiny.build("ddpm", DDIMScheduler()).unet, DDIMScheduler())
        pipe.save_pretrained(tmp_path / kind.__name__)
        return tmp_path / kind.__name__

    return folder


def test_video(tmp_path: Path, drawn: Callable[[type[Drawn]], Path]) -> None:
    call = (drawn(VideoPipeline), "--prompt", "a", "--prompt", "b", "--arg", "num_frames=4", "--fps", 10)
    for name in ("webp", "gif", "npz"):
        assert invoke(*call, "--format", name, "--output", tmp_path / name).startswith("2 videos in")
    invoke(*call, "--output", tmp_path / "default")
    assert (tmp_path / "default" / "000001.webp").read_bytes() == (tmp_path / "webp" / "000001.webp").read_bytes()
    with np.load(tmp_path / "npz" / "samples.npz") as archive:
        videos = archive["arr_0"]
    assert videos.shape == (2, 4, 8, 12, 3)
    expected = torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(rng.sample_seed(0, 1)))
    assert np.array_equal(videos[1], (expected * 255).round().to(torch.uint8).movedim(-3, -1).numpy())
    for name in ("webp", "gif"):
        with Image.open(tmp_path / name / f"000001.{name}") as video:
            assert (video.n_frames, video.size) == (4, (12, 8))  # type: ignore[attr-defined]
            video.seek(1)
            video.load()
            assert video.info["duration"] == 100
    assert Image.open(tmp_path / "gif" / "overview.png").size == (2 * 132 - 4, 128)
    line = invoke(*call, "--format", "png", "--output", tmp_path / "no", code=2)
    assert line == "error: VideoPipeline makes video, which --format png cannot hold; choose webp, gif, mp4, npz"


def test_mp4(tmp_path: Path, drawn: Callable[[type[Drawn]], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    call = (drawn(VideoPipeline), "--prompt", "a", "--format", "mp4", "--fps", 7, "--output", tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert invoke(*call, code=2) == (
        "error: --format mp4 needs imageio and its ffmpeg: pip install imageio imageio-ffmpeg; or choose --format webp"
    )
    given: list[Any] = []

    def export(frames: list[Image.Image], path: str, fps: int, macro_block_size: int) -> None:
        given.extend((len(frames), frames[0].size, fps))
        Path(path).write_bytes(MP4)

    class Reader:
        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_data(self, index: int) -> np.ndarray[Any, Any]:
            return np.zeros((8, 12, 3), np.uint8)

    imageio = ModuleType("imageio")
    imageio.__dict__["get_reader"] = lambda path: Reader()
    monkeypatch.setitem(sys.modules, "imageio", imageio)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("diffusers.utils.export_to_video", export)
    invoke(*call)
    assert given == [5, (12, 8), 7]
    assert set(contents(tmp_path / "out")) == {"000000.mp4", "overview.png", "sample.json"}


def test_sound(tmp_path: Path, drawn: Callable[[type[Drawn]], Path]) -> None:
    call = (drawn(SoundPipeline), "--prompt", "rain", "--arg", "audio_length_in_s=0.25", "--count", 2)
    assert invoke(*call, "--output", tmp_path / "out").startswith(f"2 sounds in {tmp_path / 'out'} (2 drawn in")
    assert set(contents(tmp_path / "out")) == {"000000.wav", "000001.wav", "sample.json"}
    with wave.open(str(tmp_path / "out" / "000001.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (8000, 1, 2)
        samples = np.frombuffer(sound.readframes(2000), "<i2")
    expected = torch.rand(2000, generator=torch.Generator().manual_seed(rng.sample_seed(0, 1))) * 2 - 1
    assert np.abs(samples / 32767 - expected.numpy()).max() < 1e-4


# Resuming.

SLOWLY = ("digits", "--labels", "0-9", "--count", "22", "--batch-size", "2", "--steps", "25")

# Imports once, then forks a fresh process for every run that it is told to do: each can be killed without another import.
SERVER = """
import os, sys
import flowkit.cli.sample
from flowkit.cli import app
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        app(line.split(), prog_name="flowkit")
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def samples_in(folder: Path) -> int:
    return len([*folder.glob("0*.png"), *folder.glob("parts/0*.npz")])


@pytest.mark.parametrize("file_format", ["png", pytest.param("npz", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(tmp_path: Path, file_format: str) -> None:
    call = (*SLOWLY, "--format", file_format, "--output")
    invoke(*call, tmp_path / "whole")
    out, random = tmp_path / "killed", np.random.default_rng(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    counts = []
    for wanted in (0, 1, 3, 5, 8):
        print("sample", *call, out, file=server.stdin, flush=True)
        pid = int(server.stdout.readline())
        while samples_in(out) < wanted or not (out / "sample.json").is_file():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert int(server.stdout.readline()) == -signal.SIGKILL
        counts.append(samples_in(out))
        assert all(media.whole(path) for path in out.rglob("0*.*"))
    server.stdin.close()
    server.wait()
    assert 0 < counts[-1] < 22
    line = invoke(*call, out)
    assert 0 < int(re.findall(r"\((\d+) drawn", line)[0]) < 22
    assert contents(out) == contents(tmp_path / "whole")
    assert "all were there already" in invoke(*call, out)


def test_a_stop_while_finishing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = (*DIGITS, "--format", "npz", "--output")
    invoke(*call, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        assert invoke(*call, tmp_path / "out", code=2) == "error: stopped"
    assert not (tmp_path / "out" / "samples.npz").exists()
    assert "all were there already" in invoke(*call, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_processes_of_accelerate_leave_the_same_files(tmp_path: Path) -> None:
    call = (*DIGITS, "--count", "23", "--batch-size", "4", "--output")
    invoke(*call, tmp_path / "one")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "flowkit.cli"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "sample", *call, tmp_path / "two", "--device", "cpu"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"23 images in .* \(23 drawn in .*\n", done.stdout)
    assert "process 1 of 2" in done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_damaged_files_are_drawn_again(tmp_path: Path) -> None:
    invoke(*DIGITS, "--output", tmp_path / "out")
    before = contents(tmp_path / "out")
    file = tmp_path / "out" / "000004.png"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "out" / "000007.png").unlink()
    invoke(*DIGITS, "--output", tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        (("--steps", "3"), "call.num_inference_steps 2, this run has 3"),
        (("--seed", "1"), "seed 0, this run has 1"),
        (("--count", "9"), "count 10, this run has 9"),
        (("--solver", "heun"), "scheduler.solver 'unipc', this run has 'heun'"),
        (("--labels", "1-9,0"), r"samples\[0\].class_labels 0, this run has 1"),
        (("--format", "npz"), "file_format 'png', this run has 'npz'"),
        (("--batch-size", "5"), "batch_size 16, this run has 5"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, given: tuple[str, str], difference: str) -> None:
    call = (*DIGITS, "--output", tmp_path / "out")
    invoke(*call)
    before = contents(tmp_path / "out")
    line = invoke(*call, *given, code=2)
    cure = "choose another --output, or start anew with --overwrite"
    assert re.fullmatch(f"error: {tmp_path}/out holds samples with {difference}; {cure}", line)
    assert contents(tmp_path / "out") == before
    invoke(*call, *given, "--overwrite")
    invoke(*DIGITS, *given, "--output", tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_settings_without_samples_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "draw", lambda *_: (_ for _ in ()).throw(MemoryError("use a smaller --batch-size")))
        line = invoke(*DIGITS, "--batch-size", 10, "--output", tmp_path / "out", code=2)
        assert line == "error: use a smaller --batch-size"
    invoke(*DIGITS, "--batch-size", 2, "--output", tmp_path / "out")
    assert settings(tmp_path / "out")["batch_size"] == 2


# What goes wrong.


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("digits", "--steps", "0"), "--steps 0 is out of range; give at least 1"),
        (("digits", "--count", "0"), "--count 0 is out of range; give at least 1"),
        (("digits", "--start", "-1"), "--start -1 is out of range; give at least 0"),
        (("digits", "--batch-size", "0"), "--batch-size 0 is out of range; give at least 1"),
        (("digits", "--fps", "0"), "--fps 0 is out of range; give at least 1"),
        (("digits", "--format", "jpg"), "unknown --format 'jpg'; choose png, npz, webp, gif, mp4, wav"),
        (("digits", "--labels", "1", "--format", "gif"), "ClassConditionalPipeline makes image, which --format gif"),
        (("digits", "--dtype", "int8"), "unknown dtype 'int8'; choose auto, float32, bfloat16, float16"),
        (("digits", "--device", "tpux"), "unknown device 'tpux'; choose auto, cpu, cuda, or another of torch's"),
        (("digits", "--solver", "magic"), "unknown solver 'magic'; choose one of euler, "),
        (("digits", "--grid", "magic"), "unknown grid 'magic'; choose one of uniform"),
        (("digits", "--grid", "no/file.json"), "no grid file at no/file.json; check the path"),
        (("digits", "--scheduler", "DDIMSchedular"), "unknown scheduler 'DDIMSchedular'; choose flowkit, keep, or a class of "
         "diffusers such as DDIMScheduler"),
        (("digits", "--scheduler", "keep", "--solver", "heun"), "solver changes the scheduler, and scheduler 'keep' leaves it"),
        (("digits", "--scheduler", "keep", "--knob", "debug=true"), "debug changes the scheduler, and"),
        (("digits", "--scheduler", "EulerDiscreteScheduler"), "the model predicts flow_prediction on the path 'flow', EulerDis"),
        (("digits", "--eta", "0.3", "--knob", "eta=0.4"), "eta is given twice, as 0.3 and among the knobs as 0.4"),
        (("digits", "--scheduler", "DDIMScheduler", "--solver", "heun"), "DDIMScheduler has no 'solver'; choose from beta_end"),
        (("digits", "--knob", "magic=1"), "unknown knob 'magic' = 1; choose from "),
        (("digits", "--knob", "magic"), "--knob 'magic' is no assignment; write --knob name=value"),
        (("digits", "--solver", "heun", "--knob", "solver=euler"), "solver is given twice, once by --knob solver=euler; keep one"),
        (("digits",), "ClassConditionalPipeline needs class_labels; pass --labels 0-9"),
        (("digits", "--prompt", "a cat"), "ClassConditionalPipeline needs class_labels; pass --labels 0-9"),
        (("digits", "--labels", "1", "--negative-prompt", "x"), "ClassConditionalPipeline takes no negative_prompt; it takes "),
        (("digits", "--labels", "8-10"), "input 2 has the class label 10; ClassConditionalPipeline has classes 0 to 9"),
        (("digits", "--labels", "1,x"), "labels '1,x' are no list of class labels; write them like 0,3,7 or 0-9"),
        (("digits", "--labels", "7-3"), "labels '7-3' are no list of class labels"),
        (("digits", "--labels", "1", "--prompt", "x"), "--prompt and --labels both say what to draw; keep one"),
        (("digits", "--labels", "1", "--arg", "generator=1"), "generator cannot be given: the sampler sets it"),
        (("digits", "--labels", "1", "--arg", "output_type=np"), "output_type cannot be given: --format says what is written"),
        (("digits", "--labels", "1", "--arg", "magic=1"), "ClassConditionalPipeline takes no magic; it takes class_labels, "),
        (("digits", "--labels", "1", "--steps", "2", "--arg", "num_inference_steps=3"), "num_inference_steps is given twice"),
        (("digits", "--labels", "1", "--arg", "image=no.png"), "no picture at 'no.png', given as image; check the path"),
        (("digits", "--labels", "1", "--offload", "--device", "cpu"), "--offload moves networks to a GPU when they are needed"),
        (("digits", "--prompts", "no.txt"), "no file of prompts at no.txt; check the path"),
        (("letters",), "no model 'letters': no folder of that name is here; pass digits, shapes, a folder of diffusers, or "),
        (("../letters/model",), "no model '../letters/model': no folder of that name is here"),
        (("a/b--c",), "'a/b--c' is no name of a hub repository"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(*given, "--output", "out", code=2).startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_needs_of_diffusers_pipelines(tmp_path: Path, models: Callable[[str], Path]) -> None:
    for family, given, line in (
        ("sd15", (), "StableDiffusionPipeline needs prompt; pass --prompt TEXT"),
        ("sd15", ("--labels", 1), "StableDiffusionPipeline needs prompt; pass --prompt TEXT"),
        ("sd15", ("--prompt", "x", "--arg", "class_labels=1"), "StableDiffusionPipeline takes no class_labels"),
        ("dit", ("--labels", 1000), "input 0 has the class label 1000; DiTPipeline has classes 0 to 999"),
        ("ddpm", ("--prompt", "x"), "DDPMPipeline takes no prompt; it takes batch_size"),
        ("ddpm", ("--guidance", 2), "DDPMPipeline takes no guidance_scale"),
    ):
        assert invoke(models(family), *given, "--output", tmp_path / "o", code=2).startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("p.txt", "\n \n", "holds no prompts; write one a line"),
        ("p.txt", b"\xff\xfe\xfa", "is not UTF-8 text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 of"),
        ("p.jsonl", '["a"]', "line 1 of"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "magic": 1}', "StableDiffusionPipeline takes no magic"),
        ("p.jsonl", '{"prompt": "a"}\n{"guidance_scale": 1}', "StableDiffusionPipeline needs prompt"),
    ],
)
def test_bad_files_of_prompts(
    tmp_path: Path, models: Callable[[str], Path], name: str, text: str | bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert line in invoke(models("sd15"), "--prompts", tmp_path / name, "--output", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_bad_models(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def refused() -> str:
        return invoke(folder, *DIGITS[1:], "--output", tmp_path / "out", code=2)

    folder.mkdir()
    assert refused().startswith(f"error: {folder} has no model_index.json, so it is no pipeline of diffusers")
    index = folder / "model_index.json"
    index.write_text("{")
    assert refused().startswith(f"error: model_index.json of {folder} is not JSON")
    index.write_text('{"_class_name": ["pipeline", "Mine"]}')
    assert "flowkit runs no code of a model's folder" in refused()
    flowkit.load_demo("digits").save_pretrained(folder)
    weight = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weight.read_bytes()
    weight.write_bytes(whole[:-1])
    assert "is corrupt, cut short" in refused()
    weight.rename(weight.with_suffix(".bin"))
    assert "is a pickled weight file, which can run code when it is read" in refused()
    weight.with_suffix(".bin").unlink()
    assert refused() == f"error: no .safetensors weights in {folder}; check the path, or save the pipeline again"
    (tmp_path / "model.safetensors").write_bytes(whole)
    line = invoke(tmp_path / "model.safetensors", "--output", tmp_path / "out", code=2)
    assert line.startswith(f"error: {tmp_path}/model.safetensors is a file, not a folder of diffusers; convert it")
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for output in ("file", "file/below"):
        line = invoke(*DIGITS, "--output", tmp_path / output, code=2)
        assert line == f"error: output {tmp_path / output}: {tmp_path / 'file'} is a file; choose another folder"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_bytes(b"mine")
    for given in ((), ("--overwrite",)):
        line = invoke(*DIGITS, *given, "--output", tmp_path / "photos", code=2)
        assert line.startswith(f"error: {tmp_path / 'photos'} is not empty and holds no sample.json")
    assert contents(tmp_path / "photos") == {"000000.png": b"mine"}
    invoke(*DIGITS, "--output", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    invoke(*DIGITS, "--output", tmp_path / "out", "--seed", 3, "--overwrite")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "sample.json").write_text("{")
    assert "is not JSON" in invoke(*DIGITS, "--output", tmp_path / "out", code=2)
    assert "(10 drawn" in invoke(*DIGITS, "--output", tmp_path / "out", "--overwrite")
    assert "all were there already" in invoke(*DIGITS, "--output", tmp_path / "out", "--overwrite")
    monkeypatch.setattr("os.access", lambda *_: False)
    line = invoke(*DIGITS, "--output", tmp_path / "new" / "folder", code=2)
    assert line == f"error: output {tmp_path}/new/folder: {tmp_path} cannot be written; choose another folder"


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = (*DIGITS, "--batch-size", "3", "--output")
    invoke(*call, tmp_path / "whole")
    out, write = tmp_path / "out", os.fsync

    def full(handle: int) -> None:
        if samples_in(out) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        line = invoke(*call, out, code=2)
    assert (
        line == f"error: no space is left for {out}; what is there is whole: free some and run the same command again"
    )
    assert samples_in(out) == 4
    invoke(*call, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_samples_that_are_not_finite_are_named(
    tmp_path: Path, drawn: Callable[[type[Drawn]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Drawn.draw

    def broken(self: Drawn, generator: list[torch.Generator], *shape: int) -> Tensor:
        noise = draw(self, generator, *shape)
        noise[[g.initial_seed() == rng.sample_seed(0, 5) for g in generator]] = torch.nan
        return noise

    monkeypatch.setattr(Drawn, "draw", broken)
    for kind in (VideoPipeline, SoundPipeline):
        out = tmp_path / f"{kind.__name__} samples"
        line = invoke(drawn(kind), "--prompt", "a", "--count", 8, "--batch-size", 3, "--output", out, code=2)
        assert "NaN or infinity in samples 5;" in line
        assert len(list(out.glob("0*.*"))) == 3


def test_too_little_memory_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "sample_outputs", full)
    line = invoke(*DIGITS, "--output", tmp_path / "out", code=2)
    assert line == "error: the device has too little memory; use a smaller --batch-size, --dtype bfloat16 or --offload"


# The command line itself.


def test_options_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[options.Options] = []
    monkeypatch.setattr(command, "run", calls.append)
    invoke_quietly = CliRunner().invoke
    assert invoke_quietly(app, ["sample", "digits", "--output", "here"]).exit_code == 0
    given = shlex.split(
        "sample a/b --output o --prompt one --prompt two --prompts f --negative-prompt n --labels 0-9 --count 5 --start 2 "
        "--seed 3 --arg a=1 --arg b=2 --scheduler S --solver s --grid g --steps 4 --shift 1.5 --eta 0.5 --guidance 6 "
        "--knob k=v --batch-size 7 --format npz --fps 8 --dtype float16 --device cpu --variant fp16 --offload --overwrite"
    )
    assert invoke_quietly(app, given).exit_code == 0
    assert calls == [
        options.Options("digits", Path("here")),
        options.Options(
            "a/b", Path("o"), ["one", "two"], Path("f"), "n", "0-9", 5, 2, 3, 7, "S", "s", "g", 4, 1.5, 0.5, 6.0, ["k=v"],
            ["a=1", "b=2"], "npz", 8, "float16", "cpu", "fp16", True, True,
        ),
    ]  # fmt: skip


def test_small_pictures_are_magnified_and_large_ones_fit() -> None:
    small = picture(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    large = Image.new("RGB", (60, 30), "red")
    sheet = np.asarray(mosaic([small, large, small], columns=2, size=20, gap=4))
    assert sheet.shape == (44, 44, 3)
    assert sheet[10, :20, 0].tolist() == [0] * 10 + [255] * 10  # 2 x 1 pixels, ten times, in the middle of its tile
    assert (sheet[:5, :20] == 255).all()
    assert (sheet[5:15, 24:] == (255, 0, 0)).all()
    assert (sheet[:5, 24:] == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.webp", "a.wav", "a.mp4", "a.npz"])
def test_files_cut_short_are_not_whole(tmp_path: Path, name: str) -> None:
    kind = name[2:]
    if kind == "npz":
        np.savez(tmp_path / name, np.zeros(4))
        content = (tmp_path / name).read_bytes()
    elif kind == "mp4":
        content = MP4
    elif kind == "wav":
        content = media.encode(torch.zeros(50, 1, dtype=torch.int16), "wav", 8000, {})
    else:
        frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        content = media.encode(frames[0] if kind == "png" else frames, kind, 10, {"prompt": "ü"})
    for cut in (content, content[:-1], content[: len(content) // 2], b""):
        (tmp_path / name).write_bytes(cut)
        assert media.whole(tmp_path / name) == (cut is content)
    (tmp_path / name).unlink()
    assert not media.whole(tmp_path / name)


def test_the_readme_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Sample from the command line")[2].partition("\n## ")[0]
    commands = re.findall(r"^flowkit (sample .*)$", section, re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for line in commands:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, result.output
    assert len(pixels(tmp_path / "samples" / "digits")) == 40
    with np.load(tmp_path / "samples" / "heun" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (200, 8, 8, 1)
    named = re.findall(r"`(--[a-z]+)", section)
    shown = CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "200"}).stdout
    assert [name for name in named if name not in shown] == []
