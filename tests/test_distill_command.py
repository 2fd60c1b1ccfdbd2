"""``flowkit distill``: from options and files to students, and what `flowkit sample` does with them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from diffusers import DDIMScheduler
from typer.testing import CliRunner

import flowkit
from flowkit import distill
from flowkit.cli import app
from flowkit.cli.distill import _SHARED
from flowkit.distill.runs import METHODS
from flowkit.distill.settings import Training
from flowkit.pipelines import loading

from . import tiny

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ("reflow", "digits", "--labels", "0-9", "--samples", 40, "--steps", 4, "--train-batch-size", 8)
FILE: dict[str, Any] = {
    "model": "digits", "labels": "0-9", "samples": 40, "training": {"steps": 4, "batch_size": 8}, "options": {"evaluations": 4},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def invoke(*arguments: object, code: int = 0, command: str = "distill") -> str:
    """What a command prints, or its error."""
    done = CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": "100"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def refused(*arguments: object) -> str:
    """The error of a command that must be refused before a model is loaded."""
    told = invoke(*arguments, code=2)
    assert "loading" not in told
    return told.removeprefix("error: ").strip()


def write(folder: Path, settings: Any) -> Path:
    file = folder / "run.yaml"
    file.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings, sort_keys=False))
    return file


def tensors(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*.safetensors"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("made") / "student"
    return folder, invoke(*DIGITS, "--evaluations", 4, "--output", folder)


def test_options_and_a_file_make_the_same_student(made: tuple[Path, str], tmp_path: Path) -> None:
    invoke("reflow", "--config", write(tmp_path, FILE), "--output", tmp_path / "file")
    assert tensors(made[0])
    assert tensors(made[0]) == tensors(tmp_path / "file")


@pytest.mark.slow
def test_the_student_is_that_of_python(made: tuple[Path, str], tmp_path: Path) -> None:
    how = Training(steps=4, batch_size=8)
    teacher = flowkit.load_demo("digits")
    distill.run(
        distill.Reflow(evaluations=4), teacher, range(10), output=tmp_path / "python", samples=40, training=how, progress=False
    )  # fmt: skip
    assert tensors(made[0]) == tensors(tmp_path / "python")


def test_it_says_how_to_use_the_student(made: tuple[Path, str]) -> None:
    folder, told = made
    assert f"to sample: flowkit sample {folder} --labels 0-9 --steps 1 --output samples" in told
    assert f'flowkit.ClassConditionalPipeline.from_pretrained("{folder}")' in told
    assert json.loads((folder / "distill.json").read_text())["student"] == {"steps": None, "call": {}}


def test_a_finished_run_is_told_again_and_another_is_refused(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, told = made
    assert invoke(*DIGITS, "--evaluations", 4, "--output", folder) == told
    assert "samples=40" in invoke(*DIGITS, "--samples", 50, "--evaluations", 4, "--output", folder, code=2)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    settings = {**FILE, "training": {"steps": 4, "batch_size": 8, "ema": 0.5}, "lora": {"rank": 2}, "prompts": ["a"]}
    del settings["labels"]
    from flowkit.cli.distilling import prepare

    names = [parameter.name for parameter in typer.main.get_command(app).commands["distill"].commands["reflow"].params]  # type: ignore[attr-defined]
    given = {**dict.fromkeys(names), "config": write(tmp_path, settings), "output": tmp_path / "out"}
    job = prepare("reflow", {}, given)
    assert (job.method, job.training) == (distill.Reflow(evaluations=4), Training(steps=4, batch_size=8, ema=0.5))
    assert (job.how.prompts, job.lora) == (["a"], distill.LoRA(rank=2))
    job = prepare("reflow", {"rounds": 2}, {**given, "labels": "3", "steps": 9, "lora": 5, "setting": ["clip=0.5"]})
    assert job.method == distill.Reflow(evaluations=4, rounds=2)
    assert job.training == Training(steps=9, batch_size=8, ema=0.5, clip=0.5)
    assert (job.how.prompts, job.how.labels, job.lora) == ((), "3", distill.LoRA(rank=5))


def test_every_option_of_a_method_is_on_the_command_line() -> None:
    commands = typer.main.get_command(app).commands["distill"].commands  # type: ignore[attr-defined]
    assert commands.keys() == METHODS.keys()
    shared = {p.name for p in _SHARED}
    for name, command in commands.items():
        own = {p.name.removeprefix("student_") for p in command.params if p.name not in {*shared, "help"}}
        fields = {field.name for field in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
        assert own == fields, name


def test_help_does_not_import_torch() -> None:
    script = "import sys; from flowkit.cli import app; app(['distill', 'boss', '--help'], standalone_mode=False); "
    script += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "--student-steps" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


FAULTS = {
    "model: digitz": "line 1: model cannot be used: there is no model 'digitz'; choose digits, shapes, a folder",
    "modle: digits": "line 1: modle is no field; did you mean model?",
    "labels: 9-0": "line 1: labels cannot be used: labels '9-0' are no list of class labels",
    "labels: 0-9\nprompts: [a]": "line 2: prompts say what to draw, and so do the labels; keep one",
    "prompts: none.txt": "line 1: prompts cannot be used: no file of prompts at",
    "samples: 0": "line 1: samples is 0, not a whole number of at least 1",
    "pairs: nowhere": "line 1: pairs cannot be used: no complete recording in",
    "reference: nowhere": "line 1: reference cannot be used: there is no 'nowhere'",
    "device: cup": "line 1: device cannot be used: torch knows no device 'cup'; choose auto, cpu or cuda",
    "call: {num_inference_steps: 4}": "line 1: call.num_inference_steps cannot be given here",
    "options:\n  rounds: 0": "line 2: options.rounds cannot be used: rounds must be a whole number of at least 1, got 0",
    "options: {round: 1}": "line 1: options.round is no field; did you mean rounds?",
    "options: {times: foo}": "line 1: options.times cannot be used: no law of flow times is called 'foo'",
    "training: {learning_rate: -1}": "line 1: training.learning_rate cannot be used: learning_rate must be a number",
    "training: {betas: [0.9, 2]}": "line 1: training.betas cannot be used: betas must be a number in [0, 1)",
    "training: {checkpointing: 1}": "line 1: training.checkpointing is 1, not true or false",
    "lora: {rank: x}": 'line 1: lora.rank is "x", not a whole number',
    "method: boss": 'line 1: method is "boss", and the command is of reflow; run flowkit distill boss',
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_of_a_file_are_told_with_their_lines(text: str, tmp_path: Path) -> None:
    assert FAULTS[text] in refused("reflow", "digits", "--config", write(tmp_path, text), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    texts = ["model: digitz", "samples: 0", "options: {rounds: 0, metrik: l2}", "training: {steps: 3, ema: 2, clip: x}"]
    told = refused("reflow", "--config", write(tmp_path, "\n".join(texts)), "--output", tmp_path / "out")
    for field in (
        "line 1: model",
        "line 2: samples",
        "line 3: options.rounds",
        "line 3: options.metrik",
        "training.ema",
        "training.clip",
    ):
        assert field in told


OPTIONS = {
    ("digits",): "no output is given; add --output DIR, or write output: into the file of --config",
    ("--output", "out"): "no model is given; name one",
    ("digits", "--output", "out", "--rounds", "0"): "rounds must be a whole number of at least 1, got 0",
    ("digits", "--output", "out", "--steps", "0"): "steps must be a whole number of at least 1, got 0",
    ("digits", "--output", "out", "--setting", "clop=1"): "--setting clop=1 is none; choose steps, batch_size",
    ("digits", "--output", "out", "--setting", "ema=0.5", "--ema", "0.4"): "--setting ema=0.5 is given twice; keep one",
    (
        "digits",
        "--output",
        "out",
        "--setting",
        "betas=3",
    ): "--setting betas=3 is no list; write it like betas=[0.9,0.99]",
    ("digits", "--output", "out", "--profiles", "a"): "--profiles 'a' is no list of numbers",
    ("digits", "--output", "out", "--tracker", "nobody"): "unknown tracker 'nobody'",
    ("digits", "--output", "out", "--reference", "nowhere"): "no reference 'nowhere'",
    ("digits", "--output", "out", "--pairs", "nowhere"): "no complete recording in nowhere",
    ("digits", "--output", "out", "--config", "none.yaml"): "no distillation file at none.yaml; check the path",
}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options[1:]))
def test_wrong_options_are_refused(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert OPTIONS[options] in refused("reflow", *options)


def test_a_file_without_the_extra_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [
        name for name in sys.modules if name in ("flowkit.cli.distill_file", "flowkit.validation", "flowkit.reading")
    ]:
        monkeypatch.delitem(sys.modules, name)
    file = write(tmp_path, FILE)
    monkeypatch.setitem(sys.modules, "yaml", None)
    told = refused("reflow", "--config", file, "--output", tmp_path / "out")
    assert told == '--config needs yaml: pip install "flowkit-diffusion[sweep]"'


def test_sample_takes_the_steps_of_a_student(tmp_path: Path) -> None:
    steps = 3
    invoke("onestep", *DIGITS[1:], "--student-steps", steps, "--evaluations", 6, "--output", tmp_path / "student")
    assert loading.student_call(tmp_path / "student") == {"num_inference_steps": steps}
    invoke(tmp_path / "student", "--labels", "3", "--output", tmp_path / "samples", command="sample")
    assert json.loads((tmp_path / "samples" / "sample.json").read_text())["call"] == {"num_inference_steps": steps}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["boss", "reverse"])
def test_every_method_says_how_its_student_is_used(method: str, tmp_path: Path) -> None:
    own = ("--student-steps", 2, "--anchors", 8, "--search", 10) if method == "boss" else ("--evaluations", 4)
    told = invoke(method, *DIGITS[1:], *own, "--output", tmp_path / "student")
    assert ("flowkit sample" in told) == (method == "boss")
    wanted = (
        "num_inference_steps=2"
        if method == "boss"
        else "flowkit.distill.invert(pipe, samples, dict(class_labels=...), steps=1)"
    )
    assert wanted in told


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd") / "model"
    tiny.build("sd15", DDIMScheduler(timestep_spacing="trailing")).save_pretrained(folder)
    return folder


TEXT = ("--prompt", "a cat", "--prompt", "a dog", "--guidance", 3, "--negative-prompt", "rain", "--samples", 8, "--steps", 2,
        "--train-batch-size", 4, "--evaluations", 3, "--arg", "height=16", "--arg", "width=16")  # fmt: skip


@pytest.mark.parametrize("lora", [(), ("--lora", 2)], ids=["full", "lora"])
def test_guidance_is_baked_in_and_sample_leaves_it_out(
    lora: tuple[object, ...], text_to_image: Path, tmp_path: Path
) -> None:
    student, out = tmp_path / "student", tmp_path / "samples"
    told = invoke("rectified-diffusion", text_to_image, *TEXT, *lora, "--output", student)
    assert "guidance_scale=1.0" in told
    assert loading.student_call(student) == {"guidance_scale": 1.0, "height": 16, "width": 16}
    model = (student,) if not lora else (text_to_image, "--lora", student)
    assert f"flowkit sample {' '.join(map(str, model))} --prompt 'a cat'" in told
    invoke(*model, "--prompt", "a cat", "--steps", 1, "--output", out, command="sample")
    settings = json.loads((out / "sample.json").read_text())
    assert settings["call"] == {"guidance_scale": 1.0, "height": 16, "width": 16, "num_inference_steps": 1}
    assert settings["scheduler"]["solver"] == "euler"
    pictures = [file for file in out.glob("*.png") if file.name != "overview.png"]
    assert len(pictures) == 1
    # Guidance that is given wins.
    invoke(*model, "--prompt", "a cat", "--steps", 1, "--guidance", 2, "--output", tmp_path / "other", command="sample")
    assert json.loads((tmp_path / "other" / "sample.json").read_text())["call"]["guidance_scale"] == 2
    if lora:  # the adapters are in the picture
        assert settings["lora"]
        invoke(text_to_image, "--prompt", "a cat", "--steps", 1, "--guidance", 1, "--arg", "height=16", "--arg", "width=16",
               "--solver", "euler", "--output", tmp_path / "plain", command="sample")  # fmt: skip
        assert pictures[0].read_bytes() != (tmp_path / "plain" / pictures[0].name).read_bytes()


def test_sample_refuses_a_lora_that_is_not_there(text_to_image: Path, tmp_path: Path) -> None:
    told = invoke(
        text_to_image, "--prompt", "a", "--lora", tmp_path / "no", "--output", tmp_path / "o", code=2, command="sample"
    )
    assert told.startswith(f"error: no LoRA at {tmp_path / 'no'}")
    assert "no .safetensors" in invoke(
        text_to_image, "--prompt", "a", "--lora", tmp_path, "--output", tmp_path / "o", code=2, command="sample"
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flowkit.cli", "distill", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = ("reflow", "digits", "--labels", "0-9", "--samples", 200, "--steps", 60, "--train-batch-size", 16)
    subprocess.run(command(*long, "--output", tmp_path / "whole"), check=True, env=ENVIRONMENT, capture_output=True)
    work = tmp_path / "killed.unfinished"
    running = subprocess.Popen(
        command(*long, "--output", tmp_path / "killed"), env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while not (work / "pairs-1").exists():
        assert running.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed").exists()
    subprocess.run(command(*long, "--output", tmp_path / "killed"), check=True, env=ENVIRONMENT, capture_output=True)
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")


@pytest.mark.slow
def test_processes_of_accelerate_share_a_run(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "flowkit.cli"]  # fmt: skip
    rest = command(*DIGITS, "--evaluations", 4, "--output", tmp_path / "two")[3:]
    done = subprocess.run([*launch, *rest], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to sample:") == 1
    invoke(*DIGITS, "--evaluations", 4, "--output", tmp_path / "one")
    one, two = (flowkit.ClassConditionalPipeline.from_pretrained(tmp_path / name).unet for name in ("one", "two"))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("content", ["{", "[]", '{"student": []}', '{"student": {"steps": "many", "call": {}}}'])
def test_a_student_that_does_not_say_how_it_is_called_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "distill.json").write_text(content)
    with pytest.raises(ValueError, match=r"distill\.json .*; copy the student again"):
        loading.student_call(tmp_path)
    (tmp_path / "distill.json").write_text('{"method": "flow"}')
    assert loading.student_call(tmp_path) == {}
