"""A distillation as a whole: killed, resumed, finished."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, rng, weights
from flowkit.distill import LoRA, Reflow, Training, Trajectories, run
from flowkit.distill.distillation import SAMPLES, Distillation

from .families import stock_of
from .students import SMALL, tiny, weightless
from .tiny import build
from .tiny_parts import grey

# A child after the other, each killed just before the n-th file after its start takes its name, n rising.
KILLED_AGAIN_AND_AGAIN = """
import os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from flowkit.distill import Training, run, trainer
from flowkit.pipelines import ClassConditionalPipeline

trainer.SAVE_SECONDS = trainer._SAVE_SHARE = 0
output = pathlib.Path(sys.argv[1]) / "student"
teacher = pathlib.Path(sys.argv[1]) / "teacher"


def child(left):

    def guard(real):
        def guarded(*arguments, **named):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        return guarded

    os.replace, os.rename, os.unlink = guard(os.replace), guard(os.rename), guard(os.unlink)
    run("reflow", ClassConditionalPipeline.from_pretrained(teacher), output=output, samples=16, steps=5, batch_size=8,
        progress=False)


count = 0
while True:
    count += 1
    pid = os.fork()
    if not pid:
        child(int(sys.argv[3]) + count)  # each gets a little further than the one before
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    folder = output if output.exists() else output.with_name("student.unfinished")
    print(code, folder.name, *sorted(p.name for p in folder.iterdir()), flush=True)
    if code != -signal.SIGKILL:
        break
"""


@pytest.mark.parametrize("files", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(files: int, tmp_path: Path) -> None:
    teacher = tiny()
    teacher.save_pretrained(tmp_path / "teacher")
    root = Path(__file__).resolve().parents[1]
    script = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(tmp_path), str(root), str(files)]
    child = subprocess.run(script, capture_output=True, text=True)
    lines = [line.split() for line in child.stdout.splitlines()]
    assert [line[0] for line in lines] == ["-9"] * (len(lines) - 1) + ["0"], child.stderr
    assert len(lines) > (4 if files == 1 else 2)
    names = ["README.md", "distill.json", "model_index.json", "pairs-1", "scheduler", "training-1", "unet"]
    assert lines[-1][1:] == ["student", *names]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "teacher"]
    teacher = ClassConditionalPipeline.from_pretrained(tmp_path / "teacher")
    run("reflow", teacher, output=tmp_path / "whole", samples=16, steps=5, batch_size=8, progress=False)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == names
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "student" / file.relative_to(tmp_path / "whole")).read_bytes(), file


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline]:
    """A teacher, the folder of its student, and the student."""
    teacher, folder = tiny(), tmp_path_factory.mktemp("run") / "student"
    return teacher, folder, run("reflow", teacher, output=folder, **SMALL)


def test_the_student_is_an_ordinary_folder(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    teacher, folder, student = finished
    assert isinstance(student, ClassConditionalPipeline)
    assert student.scheduler.config["solver"] == "euler"
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    changed = 0
    for name, weight in student.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])
        changed += not torch.equal(weight, teacher.unet.state_dict()[name])
    assert changed > 20
    noise = rng.normal((1, 8, 8), 5, [0])
    one = student(class_labels=[1], latents=noise, num_inference_steps=1, output_type="latent").images
    with torch.no_grad():
        velocity = unet(noise, 1000.0, class_labels=torch.tensor([1])).sample
    assert torch.allclose(one, noise - velocity, atol=1e-6)
    stock.set_timesteps(sigmas=[1.0])
    assert torch.allclose(stock.step(velocity, stock.timesteps[0], noise).prev_sample, one, atol=1e-6)


def test_pairs_are_those_of_the_teacher(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    teacher, folder, _ = finished
    pairs = Trajectories(folder / "pairs-1")
    assert (len(pairs), pairs.at, len(pairs.grid)) == (20, [0, 8], 8)
    item = pairs[13]
    assert item["inputs"] == {"class_labels": 1}
    teacher.set_progress_bar_config(disable=True)
    drawn = teacher([1], latents=item["states"][:1], num_inference_steps=8, output_type="latent", return_dict=False)[0]
    assert torch.allclose(drawn[0], item["states"][1], atol=1e-5)
    # No evaluation draws this noise under the same seed.
    assert not torch.isclose(
        item["states"][0], rng.normal((1, 8, 8), [rng.sample_seed(0, 13)], tag=rng.INITIAL)[0]
    ).all()


def test_the_folder_says_how_it_was_made(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    _, folder, _ = finished
    settings = json.loads((folder / "distill.json").read_text())
    assert (settings["method"], settings["samples"], settings["training"]["steps"]) == ("reflow", 20, 6)
    assert settings["student"] == {"steps": None, "call": {}}
    card = (folder / "README.md").read_text()
    assert "distilled from" in card
    assert str(folder) not in card
    history = json.loads((folder / "training-1" / "training.json").read_text())["history"]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert (folder / "training-1" / "samples-000006.png").is_file()
    assert not [*folder.rglob("*checkpoint*"), *folder.rglob("conditions"), *folder.rglob(".*")]


def test_a_finished_run_is_only_loaded(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    teacher, folder, student = finished

    def fail(*args: Any) -> None:
        raise AssertionError("the teacher was called")

    handle = teacher.unet.register_forward_pre_hook(fail)
    again = run("reflow", teacher, [0, 1, 2, 3], output=str(folder), **SMALL)  # the same labels, said in another way
    handle.remove()
    for a, b in zip(again.unet.parameters(), student.unet.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 21}, "samples=20, this one has 21"),
        ({"steps": 7}, "training.steps=6, this one has 7"),
        ({"seed": 1}, "seed=0, this one has 1"),
        ({"batch_size": 4}, "batch_size=8, this one has 4"),
        ({"inputs": [2]}, "inputs_sha256="),
        ({"teacher": 1}, "teacher_sha256="),
        ({"method": Reflow(evaluations=3)}, "options.evaluations=None, this one has 3"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline], change: dict[str, Any], message: str
) -> None:
    teacher, folder, _ = finished
    before = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    arguments = {**SMALL, "teacher": teacher, **change}
    if "teacher" in change:
        arguments["teacher"] = tiny(seed=1)
    with pytest.raises(ValueError, match=f"{message}.*resume=False"):
        run(**{"method": "reflow", "output": folder, **arguments})
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    teacher, folder = tiny(), tmp_path / "student"
    folder.mkdir()  # an empty folder is free
    first = run("reflow", teacher, output=folder, **SMALL)
    again = run("reflow", teacher, output=folder, resume=False, **{**SMALL, "steps": 7, "seed": 3})
    assert json.loads((folder / "distill.json").read_text())["seed"] == 3
    pairs = zip(first.unet.parameters(), again.unet.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_defaults_are_one_pair_for_each_input() -> None:
    def samples(inputs: Any, count: int | None = None) -> int:
        how = Training(3)
        return Distillation(
            Reflow(), tiny(), inputs, count, None, None, None, None, None, how, {"reference": None}, 0, 8
        ).samples

    assert samples(None) == SAMPLES
    assert samples([1] * 12_345) == 12_345
    assert samples([1, 2], 5) == 5


def test_a_round_learns_from_the_student_before(tmp_path: Path) -> None:
    teacher = tiny()
    one = run(Reflow(), teacher, output=tmp_path / "one", **SMALL)
    run(Reflow(rounds=2), teacher, output=tmp_path / "two", **SMALL)
    first, second = Trajectories(tmp_path / "two" / "pairs-1"), Trajectories(tmp_path / "two" / "pairs-2")
    assert not torch.equal(first[0]["states"][0], second[0]["states"][0])  # fresh noise
    noise = second[5]["states"][:1]
    one.set_progress_bar_config(disable=True)
    one.scheduler = RectifiedFlowScheduler.from_config(one.scheduler, solver="unipc")
    drawn = one([1], latents=noise, num_inference_steps=8, output_type="latent", return_dict=False)[0]
    assert torch.allclose(drawn[0], second[5]["states"][1], atol=1e-4)


def test_a_function_of_inputs_is_asked_for_the_samples_alone(tmp_path: Path) -> None:
    labels = [0, 1, 2, 3, 0]
    run("reflow", tiny(), lambda i: {"class_labels": labels[i]}, output=tmp_path / "s", **{**SMALL, "samples": 5})


def test_adapters_that_are_finished_are_only_loaded_and_the_teacher_is_measured_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, seen = build("sd15", stock_of("sd15")), dict[str, bool]()
    network, folder = teacher.unet, tmp_path / "s"

    def measured(self: Distillation, data: Any, looks: Any) -> list[Any]:
        layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        seen["teacher"] = bool(layers) and all(layer.disable_adapters for layer in layers)
        return []

    monkeypatch.setattr(Distillation, "_scores", measured)
    arguments: dict[str, Any] = {
        "inputs": ["a cat"], "call": {"height": 16, "width": 16, "guidance_scale": 1.0}, "lora": LoRA(4), "output": folder,
        **{**SMALL, "samples": 4, "steps": 2},
    }  # fmt: skip
    first = run(Reflow(evaluations=2), teacher, **arguments)
    assert seen == {"teacher": True}
    handle = network.register_forward_pre_hook(lambda *given: pytest.fail("the teacher was called"))
    again = run(Reflow(evaluations=2), teacher, **arguments)
    handle.remove()
    for got, wanted in zip(again.unet.parameters(), first.unet.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_what_a_kill_between_rename_and_tidying_left_is_removed(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline], tmp_path: Path
) -> None:
    teacher, folder, _ = finished
    shutil.copytree(folder, tmp_path / "s")
    (tmp_path / "s" / "conditions").mkdir()
    kept, *torn = (".gitattributes", "training-1/checkpoint.safetensors", ".distill.json.abcd_123")
    for name in (kept, *torn):
        (tmp_path / "s" / name).write_text("")
    run("reflow", teacher, output=tmp_path / "s", **SMALL)
    left = {str(file.relative_to(tmp_path / "s")) for file in (tmp_path / "s").rglob("*")}
    assert left == {str(file.relative_to(folder)) for file in folder.rglob("*")} | {kept}


def test_another_network_can_be_the_student(tmp_path: Path) -> None:
    small = grey(4, 3, block_out_channels=(4, 4), norm_num_groups=2)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    student = run("reflow", weightless(), output=tmp_path / "student", student=small, **SMALL)
    assert student.unet.config["block_out_channels"] == [4, 4]
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in student.unet.state_dict().items())
    again = ClassConditionalPipeline.from_pretrained(tmp_path / "student")
    assert again.scheduler.config["solver"] == "euler"


def test_guidance_is_baked_in(tmp_path: Path) -> None:
    teacher = build("sd15", stock_of("sd15"))
    words = [{"prompt": word} for word in ("a cat", "a dog")]
    small = {**SMALL, "samples": 4}
    run(
        Reflow(evaluations=2),
        teacher,
        words,
        call={"guidance_scale": 3.0, "height": 16, "width": 16},
        output=tmp_path / "s",
        **small,
    )
    settings = json.loads((tmp_path / "s" / "distill.json").read_text())
    assert settings["call"]["guidance_scale"] == 3.0
    assert settings["student"]["call"] == {"height": 16, "width": 16, "guidance_scale": 1.0}
    assert "Guidance of scale 3 is baked in" in (tmp_path / "s" / "README.md").read_text()


def test_a_teacher_of_half_precision_has_a_student_of_its_kind(tmp_path: Path) -> None:
    teacher = build("sd15", stock_of("sd15"), torch.bfloat16)
    call = {"height": 16, "width": 16, "guidance_scale": 3.0}
    student = run(
        Reflow(rounds=2, evaluations=2), teacher, [{"prompt": "a cat"}], call=call, output=tmp_path / "s", **SMALL
    )
    assert student.unet.dtype == torch.bfloat16
    tensors = weights.read(tmp_path / "s" / "unet" / "diffusion_pytorch_model.safetensors")[0]
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_the_time_is_told_before_and_shown_during(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("reflow", tiny(), output=tmp_path / "student", **{**SMALL, "progress": True})
    told = capfd.readouterr().err
    assert re.search(r"about [\d.]+ s for the teacher's samples and [\d.]+ s for 6 updates", told)
    assert "160/160" in told
    assert "6/6" in told
