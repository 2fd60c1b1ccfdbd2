"""``flowkit fid``: from the command line to figures, files and one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import flowkit
from flowkit import assets
from flowkit.cli import app
from flowkit.eval import FeatureStats, Result, evaluate

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ("digits", "--labels", "0-9", "--steps", "2", "--num-images", "120", "--batch-size", "20")
pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def invoke(*arguments: object, code: int = 0) -> list[str]:
    """Runs ``flowkit fid``; returns the lines of its output, or of its errors."""
    result = CliRunner().invoke(app, ["fid", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return (result.stdout if code == 0 else result.stderr).splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fid") / "run"
    invoke(*DIGITS, "--reference", "digits", "--metrics", "fid,kid,fid/pixels", "--output", folder)
    return folder


def test_the_command_gives_the_figures_of_python(run: Path, tmp_path: Path) -> None:
    pipe: Any = flowkit.load_demo("digits")
    expected = evaluate(pipe, "digits", 120, ["fid", "kid", "fid/pixels"], inputs=range(10), call={"num_inference_steps": 2},
                        batch_size=20, progress=False)  # fmt: skip
    found = Result.load(run)
    assert (dict(found), found.se) == (dict(expected), expected.se)
    *lines, last = invoke(
        *DIGITS, "--reference", "digits", "--metrics", "fid,kid,fid/pixels", "--output", run, "--json", tmp_path / "a"
    )
    assert [line.split()[0] for line in lines] == ["fid", "kid", "fid/pixels"]
    assert lines[0] == f"fid {found['fid']:.5g} ± {found.se['fid']:.2g}"
    assert re.fullmatch(rf"120 images in .* s; record: {run}/result.json and {tmp_path}/a", last)
    record = json.loads((tmp_path / "a").read_text())
    assert record["spec"]["command"].split()[0] == "flowkit"
    assert record["figures"]["fid"]["value"] == found["fid"]


def test_statistics_of_pictures_serve_as_reference(tmp_path: Path) -> None:
    held_out = assets.images("digits", "held-out")[0]
    (tmp_path / "png").mkdir()
    for index, image in enumerate(held_out):
        Image.fromarray(image[0].numpy()).save(tmp_path / "png" / f"{index:04d}.png")
    call = ("stats", tmp_path / "png", "--like", "digits", "--channels", 1, "--output")
    for name in ("stats.npz", "stats.safetensors"):
        (line,) = invoke(*call, tmp_path / name)
        assert line == f"statistics of 500 images, 32 features of classifier: {tmp_path / name}"
        first, _ = invoke(tmp_path / "png", "--channels", 1, "--reference", tmp_path / name)
        assert float(first.split()[1]) < 1e-6
    with np.load(tmp_path / "stats.npz") as file:
        assert {"mu", "sigma"} <= set(file.files)
    embedded = FeatureStats.load(assets.folder("digits") / "reference.safetensors", prefix="classifier.")
    made = FeatureStats.load(tmp_path / "stats.safetensors")
    assert torch.allclose(made.mean, embedded.mean, atol=1e-6)
    (error,) = invoke(tmp_path / "png", "--reference", tmp_path / "png", "--extractor", "classifier", code=2)
    assert "cannot be built by name alone" in error


def test_differences_and_spreads(run: Path, tmp_path: Path) -> None:
    invoke(*DIGITS, "--reference", "digits", "--seed", 1, "--json", tmp_path / "b.json")
    lines = invoke("summarize", run, tmp_path / "b.json")
    assert re.fullmatch(r"fid \S+ ± \S+, 95 % from \S+ to \S+, spread \S+, smallest \S+", lines[0])
    (error,) = invoke("compare", run, tmp_path / "b.json", code=2)
    assert error == "error: the samples do not pair: their seed is 0 and 1; draw both alike"
    lines = invoke("compare", run, run, "--level", 0.9)
    assert lines[0].startswith("fid 0 ± 0, 90 % from 0 to 0")


def test_weights_are_converted(tmp_path: Path) -> None:
    from flowkit.eval.inception import random_weights
    from flowkit.eval.weight_files import content_hash, read_weights
    from flowkit.weights import write

    state = random_weights(0)
    write(tmp_path / "net.safetensors", state)
    (line,) = invoke("weights", tmp_path / "net.safetensors", "--output", tmp_path / "out")
    assert line.startswith(f"{tmp_path}/out/net.safetensors (weights {content_hash(state)[:16]}")
    assert content_hash(read_weights(tmp_path / "out" / "net.safetensors")) == content_hash(state)
    torch.save({"a": torch.zeros(1)}, tmp_path / "w-6726825d.pth")
    (error,) = invoke("weights", tmp_path / "w-6726825d.pth", "--output", tmp_path, code=2)
    assert "not 6726825d" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone",), "no images at gone"),
        (("digits", "--labels", "0", "--reference", "gone"), "no reference 'gone'"),
        (("digits", "--reference", "digits", "--labels", "0-9", "--metrics", "fvd"), "unknown metric 'fvd'"),
        (("digits", "--reference", "digits"), "needs class_labels; pass --labels 0-9"),
        (("digits", "--size", "8", "--labels", "0"), "--channels, --size and --alpha are for image files"),
        ((".", "--steps", "4"), "--steps say how a model is sampled"),
        (
            ("digits", "--reference", "digits", "--labels", "0", "--output", __file__),
            "is a file; choose another folder",
        ),
        (("stats", "digits", "--labels", "0", "--output", "stats.pt"), "must end with .safetensors or .npz"),
        (("compare", "gone", "gone"), "no result at gone"),
        (("weights", "gone.pth"), "no Inception weights at gone.pth"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    *_, line = invoke(*arguments, code=2)
    assert line.startswith("error: ")
    assert message in line


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom flowkit.cli import app\n"
        "for a in ([], ['--help'], ['stats', '--help'], ['weights', '--help'], ['compare', '--help'], ['summarize', '--help']):\n"
        "    r = CliRunner().invoke(app, ['fid', *a])\n    assert r.exit_code in (0, 2) and 'Usage' in r.output, r.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.slow
def test_processes_of_accelerate_give_the_same_bits(run: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "flowkit.cli"]  # fmt: skip
    call = ["fid", *DIGITS, "--reference", "digits", "--metrics", "fid,kid,fid/pixels", "--device", "cpu", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *call, str(tmp_path / "two")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = Result.load(run), Result.load(tmp_path / "two")
    assert (dict(one), one.se, one.spec["samples"]) == (dict(two), two.se, two.spec["samples"])
    assert two.spec["processes"] == 2
    assert done.stdout.count("fid/pixels") == 1
    wrong = subprocess.run([*launch, *call, str(ROOT / "README.md")], capture_output=True, text=True, env=environment)
    assert wrong.returncode != 0
    assert wrong.stderr.count("error: output") == 1


def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks].count("bash") == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/evaluation.md", "exec"), names)
        else:
            for line in code.splitlines():
                assert line.startswith("flowkit fid ")
                invoke(*line.split()[2:])
    assert set(Result.load("runs/four")) == {"fid", "kid", "recall"}
    assert json.loads(Path("four.json").read_text())["figures"]["fid"]["value"] == Result.load("runs/four")["fid"]


def test_the_page_shows_what_the_benchmark_prints() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- printed by `python benchmarks/eval.py --table` -->\n((?:.*\n)*?)<!-- end -->", page)
    command = [sys.executable, "benchmarks/eval.py", "--table"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == shown
