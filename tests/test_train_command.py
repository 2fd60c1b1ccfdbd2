"""``flowkit train flow``: from a folder of images to a model that samples, stopped by a kill and gone on with to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flowkit import assets, weights
from flowkit.cli import app
from flowkit.distill import panel

from .test_train_flow import tiny_digits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_digits().save_pretrained(folder)
    return folder


def command(*words: object) -> list[str]:
    return ["train", "flow", *map(str, words)]


def test_a_folder_of_images_becomes_a_model_that_samples(tmp_path: Path, model: Path) -> None:
    pixels, labels = assets.images("digits", count=40)
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        folder = tmp_path / "images" / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    made = tmp_path / "made"
    words = [
        model,
        "--data",
        tmp_path / "images",
        "--output",
        made,
        "--steps",
        "4",
        "--batch-size",
        "8",
        "--workers",
        "0",
    ]
    more = ["--coupling", "ot", "--times", "logit-normal", "--flip", "--every", "2", "--sample-steps", "2"]
    result = CliRunner().invoke(app, command(*words, *more))
    assert result.exit_code == 0, result.output
    assert f"to sample: flowkit sample {made} --labels 0 --output samples" in result.stdout.replace("\n", "")
    assert "4 updates" in result.stderr
    settings = json.loads((made / "distill.json").read_text())
    assert settings["classes"] == [f"digit-{label}" for label in range(10)]
    assert settings["data"]["count"] == 40
    assert [settings[key] for key in ("coupling", "times", "flip")] == ["ot", "logit-normal", True]
    assert [row["step"] for row in json.loads((made / "training" / "watch.json").read_text())["rows"]] == [2, 4]
    sampled = CliRunner().invoke(
        app, ["sample", str(made), "--labels", "3", "--output", str(tmp_path / "samples"), "--steps", "2"]
    )
    assert sampled.exit_code == 0, sampled.output
    again = CliRunner().invoke(app, command(*words, *more, "--steps", "5"))
    assert again.exit_code == 2
    assert "holds a run with training.steps=4, this one has 5" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "/nowhere"], "no images at /nowhere; check the path"),
        (["--data", "digits", "--times", "never"], "no law of flow times is called 'never'"),
        (["--data", "digits", "--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--data", "shapes"], "labels run from 0 to 11, and ClassConditionalPipeline has 10 classes"),
        (["--data", "digits", "--lora", "4"], "pass init='weights'"),
    ],
)
def test_what_users_get_wrong_is_one_line(tmp_path: Path, model: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, command(model, "--output", tmp_path / "out", *words))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from flowkit.cli import app\n"
        "try: app(['train', 'flow', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--coupling" in out
    assert out.endswith("False\n")


SCRIPT = """
import sys
from flowkit.cli import app
from flowkit.distill import panel, trainer
panel.draw = lambda *_: None
trainer.SAVE_SECONDS = trainer._SAVE_SHARE = 0.0
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path, model: Path) -> None:
    def start(output: str) -> subprocess.Popen[bytes]:
        words = [
            model,
            "--data",
            "digits",
            "--output",
            tmp_path / output,
            "--steps",
            "60",
            "--batch-size",
            "8",
            "--workers",
            "1",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *command(*words)], env=environment, stdout=out, stderr=out
        )

    whole = start("whole")
    cut = start("cut")
    checkpoint = tmp_path / "cut.unfinished" / "training" / "checkpoint.safetensors"
    deadline = time.monotonic() + 600
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert int(weights.read(checkpoint)[1]["step"]) < 24
    assert not (tmp_path / "cut").exists()
    assert start("cut").wait(600) == 0
    assert whole.wait(600) == 0
    one, other = (
        weights.read(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")[0] for name in ("whole", "cut")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
