"""Sweeps as users run them: figures, failures, stops, folders and databases that do not fit, and what is left on the disk."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from typer.testing import CliRunner

import flowkit
from flowkit.cli import app
from flowkit.eval import PixelExtractor, run_sweep, runs, write_report
from flowkit.eval.images import Images
from flowkit.eval.job import carry_out, prepare
from flowkit.eval.measuring import plan
from flowkit.eval.processes import Processes
from flowkit.eval.sweep import worker
from flowkit.eval.sweep.cells import Cell
from flowkit.eval.sweep.config import read as read_config
from flowkit.eval.sweep.storage import storage_url
from flowkit.eval.sweep.study import Claim, Study
from flowkit.progress import bar

from . import postgres, tiny

ROOT = Path(__file__).parent.parent
SMALL = {
    "name": "small", "model": "digits", "reference": "digits", "images": 40, "batch_size": 20, "labels": "0-9", "keep": 4,
    "axes": {"solver": ["euler", "unipc"], "steps": [1, 2], "guidance_scale": [1.0, 2.0]},
}  # fmt: skip


def sweep(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


def figures(output: Path) -> dict[str, Any]:
    """What a sweep measured, but for its times."""
    rows = json.loads((output / "results.json").read_text())["rows"]
    return {row["name"]: (row["metrics"], row["evaluations"], row["spec"]["samples"]["sha256"]) for row in rows}


def invoke(*arguments: object, code: int = 0) -> str:
    """What a command prints; of an error the error."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.stderr if code == 2 else done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing disturbed."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    entries = run_sweep(SMALL, output, progress=False)
    assert [entry.state for entry in entries] == ["done"] * 8
    return output


def test_cells_are_what_evaluate_measures(finished: Path) -> None:
    pipe = flowkit.load_demo("digits")
    found = figures(finished)
    for solver, steps, scale in (("euler", 2, 2.0), ("unipc", 1, 1.0)):
        pipe.scheduler = flowkit.RectifiedFlowScheduler(solver=solver, noise="keyed")
        call = {"num_inference_steps": steps, "guidance_scale": scale}
        alone = flowkit.eval.evaluate(pipe, "digits", 40, inputs=range(10), call=call, batch_size=20, progress=False)
        name = f"{solver}, {steps} step{'s' * (steps > 1)}, w = {scale:g}"
        assert found[name][0]["fid"]["value"] == alone["fid"]
        assert found[name][0]["fid"]["se"] == alone.se["fid"]
        assert found[name][1] == steps * (2 if scale > 1 else 1)
        assert found[name][2] == alone.spec["samples"]["sha256"]


def test_what_is_left_on_the_disk(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "cells",
        "report.html",
        "results.json",
        "study.db",
        "sweep.json",
    ]
    for cell in (finished / "cells").iterdir():
        assert sorted(p.name for p in cell.iterdir()) == ["result.json", "run.json", "samples.png"]
    page = write_report(finished).read_text()
    assert page.count("data:image/png") >= 8
    assert "unipc, 2 steps, w = 1" in page


def test_differences_between_cells_are_paired(finished: Path) -> None:
    rows = json.loads((finished / "results.json").read_text())["rows"]
    assert len({row["pairs"] for row in rows}) == 1
    assert all(len(row["metrics"]["fid"]["left_out"]) == 20 for row in rows)
    cells = [finished / "cells" / row["spec"]["cell"] for row in rows]
    assert flowkit.eval.compare(cells[0], cells[1])["fid"].se > 0


def test_a_finished_sweep_draws_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.Worker, "measure", lambda *_: pytest.fail("a finished cell was measured again"))
    before = figures(finished)
    assert [entry.state for entry in run_sweep(SMALL, finished, progress=False)] == ["done"] * 8
    assert figures(finished) == before


def test_a_cell_that_fails_is_noted_and_the_rest_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = worker.Worker.measure

    def failing(self: worker.Worker, cell: Cell) -> Any:
        if cell.get("solver") == "unipc" and cell.get("steps") == 1:
            raise ArithmeticError("the samples are \x1b[31mnot\nfinite")
        return measure(self, cell)

    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep(axes={"solver": ["euler", "unipc"], "steps": [1, 2]})))
    monkeypatch.setattr(worker.Worker, "measure", failing)
    monkeypatch.chdir(tmp_path)
    text = invoke("sweep", "run", file, "--output", "out", code=1)
    assert "3 of 4 cells; report: out/report.html" in text
    assert (
        "4 cells, 3 done, 1 failed\nfailed: unipc, 1 step: ArithmeticError: the samples are  [31mnot finite"
        in invoke("sweep", "status", "out")
    )
    assert "the samples are  [31mnot finite" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(worker.Worker, "measure", measure)
    assert "3 of 4 cells" in invoke("sweep", "resume", "out", code=1)
    assert "4 of 4 cells" in invoke("sweep", "resume", "out", "--failed")


def test_status_best_and_export(finished: Path, tmp_path: Path) -> None:
    assert invoke("sweep", "status", finished) == "small: 8 cells, 8 done\n"
    best = invoke("sweep", "best", finished)
    assert "euler, 1 step, w = 1" in best or "unipc, 1 step, w = 1" in best
    assert "2 steps" not in invoke("sweep", "best", finished, "--evaluations", 1)
    assert "no cell has at most 0.5 evaluations; the cheapest has 1" in invoke(
        "sweep", "best", finished, "--evaluations", 0.5, code=2
    )
    for name, words in {"markdown": "| ", "csv": ",", "latex": r"\toprule"}.items():
        assert words in invoke("sweep", "export", finished, "--format", name)
    invoke("sweep", "export", finished, "--format", "json", "--output", tmp_path / "table.json")
    assert len(json.loads((tmp_path / "table.json").read_text())) == 8


def test_plan_says_what_it_will_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep(axes={"solver": ["euler"], "steps": [1, 4], "guidance_scale": [1.0, 2.0]})))
    monkeypatch.chdir(tmp_path)
    text = " ".join(invoke("sweep", "plan", file).split())
    assert "4 cells of 40 images" in text
    assert "in all 160 images, 600 network evaluations, about" in text
    file.write_text(yaml.safe_dump(sweep(solver="heun", axes={"steps": [8, 1, 2]})))
    assert f"{40 * (1 + 3 + 15)} network evaluations" in " ".join(invoke("sweep", "plan", file).split())
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.yaml"]
    file.write_text(
        yaml.safe_dump(sweep(search={"sampler": "tpe", "trials": 10}, axes={"steps": {"low": 1, "high": 4}}))
    )
    assert "10 cells of 40 images; the cheapest and the dearest" in " ".join(invoke("sweep", "plan", file).split())


def test_runs_that_share_a_folder_read_reference_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, theirs = flowkit.load_demo("digits"), torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    read: list[int] = []
    blocks = Images.blocks

    def noted(self: Images, *span: int) -> Iterator[torch.Tensor]:
        read.append(span[1])
        return blocks(self, *span)

    monkeypatch.setattr(Images, "blocks", noted)
    requests = plan(["kid"], theirs, PixelExtractor(1), torch.device("cpu"))
    found: list[float] = []
    for steps in (1, 2, 1):
        sampling = {"seed": 0, "inputs": range(10), "call": {"num_inference_steps": steps}}
        job, output = prepare(pipe, requests, 20, 20, sampling, Processes()), tmp_path / str(len(found))
        found.append(carry_out(job, Processes(), bar(False), output, references=tmp_path / "references")["kid"])
    assert read == [0, 20]  # two batches, for three runs
    assert found[0] == found[2] != found[1]
    other = plan(["kid"], theirs.flip(0), PixelExtractor(1), torch.device("cpu"))
    carry_out(
        prepare(pipe, other, 20, 20, sampling, Processes()), Processes(), bar(False), references=tmp_path / "references"
    )
    assert read == [0, 20, 0, 20]  # other images are others


KILLED = "from flowkit.eval import run_sweep; import json, sys; run_sweep(json.loads(sys.argv[1]), sys.argv[2], progress=False)"


def start(config: Mapping[str, Any], output: Path, storage: str | None = None) -> subprocess.Popen[bytes]:
    given = {**config, **({} if storage is None else {"storage": storage})}
    return subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(given), str(output)], cwd=ROOT)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_figures(finished: Path, tmp_path: Path) -> None:
    chance, output = random.Random(0), tmp_path / "out"
    for _ in range(6):
        one = start(SMALL, output)
        time.sleep(4 + 6 * chance.random())
        one.send_signal(signal.SIGKILL)
        one.wait()
    last = start(SMALL, output)
    assert last.wait(timeout=300) == 0
    assert figures(output) == figures(finished)
    assert not list(output.rglob("*.safetensors"))


@pytest.mark.slow
def test_two_workers_on_postgresql_share_forty_cells_and_one_is_killed(tmp_path: Path) -> None:
    config = sweep(
        images=20, axes={"solver": ["euler", "unipc", "heun", "ab2"], "steps": list(range(1, 11))}, heartbeat=1
    )
    with postgres.server() as url:
        workers = [start(config, tmp_path / "out", url) for _ in range(2)]
        results = tmp_path / "out" / "results.json"
        until = time.monotonic() + 300
        while not (results.is_file() and len(json.loads(results.read_text())["rows"]) >= 10):
            assert time.monotonic() < until
            time.sleep(0.2)
        workers[0].send_signal(signal.SIGKILL)
        assert [worker.wait(timeout=600) for worker in workers] == [-signal.SIGKILL, 0]
        import optuna

        study = optuna.load_study(study_name="small", storage=storage_url(url, tmp_path))
        done = [t.user_attrs["slot"] for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        names = {t.user_attrs["worker"]["pid"] for t in study.trials if "worker" in t.user_attrs}
        assert sorted(done) == list(range(40))
        assert len(names) == 2
    alone = tmp_path / "alone"
    run_sweep({**config, "axes": {"solver": ["heun"], "steps": [3, 7]}}, alone, progress=False)
    assert figures(alone).keys()
    both = figures(tmp_path / "out")
    for name, value in figures(alone).items():
        assert both[f"heun, {name}"] == value


@pytest.mark.slow
def test_a_cell_runs_on_two_processes(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    # accelerate starts several processes on one machine for GPUs only; without any they share the work on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "flowkit.cli"]  # fmt: skip
    call = ["sweep", "run", str(file), "--output", str(tmp_path / "out")]
    done = subprocess.run([*launch, *call], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 of 8 cells") == 1
    assert figures(tmp_path / "out") == figures(finished)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["spec"]["processes"] for row in rows] == [2] * 8


def test_an_interrupted_cell_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep(axes={"steps": [1, 2]})
    measure = worker.Worker.measure
    monkeypatch.setattr(worker.Worker, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, tmp_path / "out", progress=False)
    assert "2 cells, 2 waiting" in invoke("sweep", "status", tmp_path / "out")
    monkeypatch.setattr(worker.Worker, "measure", measure)
    assert [entry.state for entry in run_sweep(config, tmp_path / "out", progress=False)] == ["done"] * 2


def test_a_cell_that_nobody_works_on_does_not_look_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.Worker, "measure", lambda *_: (_ for _ in ()).throw(SystemExit))
    before = threading.active_count()
    with pytest.raises(SystemExit):
        run_sweep(sweep(axes={"steps": [1]}), tmp_path / "out", progress=False)
    assert threading.active_count() == before


def test_a_worker_that_was_taken_for_dead_leaves_the_folder_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []

    def late(self: Study, claim: Claim, *figures: Any) -> bool:
        self.give_back(claim)  # as another worker does with a trial that was silent
        monkeypatch.setattr(Study, "finish", finish)
        return self.finish(claim, *figures)

    def forget(self: worker.Worker, cell: Cell) -> None:
        left.append((self.folder(cell) / "samples").is_dir())

    finish = Study.finish
    monkeypatch.setattr(Study, "finish", late)
    monkeypatch.setattr(worker.Worker, "forget", forget)
    entries = run_sweep(sweep(axes={"steps": [1]}), tmp_path / "out", progress=False)
    assert [entry.state for entry in entries] == ["done"]
    assert left == [True, True]  # by the one that has the cell, and at the end


def test_equal_cells_at_the_same_time_are_both_done(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(self: worker.Worker, cell: Cell) -> Any:
        shutil.copytree(finished / "cells" / cell.key, self.folder(cell))
        raise FileNotFoundError("samples/block-000000.json")  # the faster one has removed it

    monkeypatch.setattr(worker.Worker, "_measured", overtaken)
    assert [entry.state for entry in run_sweep(SMALL, tmp_path / "out", progress=False)] == ["done"] * 8
    assert figures(tmp_path / "out") == figures(finished)


def test_a_full_disk_stops_the_worker_and_costs_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep(axes={"steps": [1, 2]})
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(runs.NoRoomError, match=r"the features take .* has 0.0 GB left; choose another folder"):
            run_sweep(config, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()
    with monkeypatch.context() as full:
        full.setattr(
            worker, "carry_out", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            run_sweep(config, tmp_path / "out", progress=False)
    assert "2 cells, 2 waiting" in invoke("sweep", "status", tmp_path / "out")


def test_folders_that_do_not_fit(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="holds a sweep of another configuration: images was 40, now it is 50; choose another output"
    ):
        run_sweep(sweep(images=50), finished, progress=False)
    with pytest.raises(ValueError, match="holds a sweep already; pass resume=True"):
        run_sweep(SMALL, finished, resume=False, progress=False)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        ValueError, match=r"is not empty and holds no sweep.json, so it is no folder of a sweep; choose another"
    ):
        run_sweep(SMALL, tmp_path, progress=False)
    with pytest.raises(NotADirectoryError, match="is a file; choose another folder"):
        run_sweep(SMALL, tmp_path / "thesis.tex" / "out", progress=False)
    assert "so no sweep began there; pass the output folder of one" in invoke("sweep", "status", tmp_path, code=2)
    (tmp_path / "sweep.json").write_text("{")
    assert "is not JSON" in invoke("sweep", "best", tmp_path, code=2)


def test_a_sweep_goes_on_in_the_database_it_began_with(tmp_path: Path) -> None:
    config, url = sweep(axes={"steps": [1]}), f"sqlite:///{tmp_path / 'shared.db'}"
    run_sweep(config, tmp_path / "out", storage=url, progress=False)
    run_sweep(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "study.db").exists()
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["storage"] == url
    secret = content | {"storage": "postgresql://user:***@host/db"}
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(secret))
    with pytest.raises(ValueError, match="asks for a password, which is not kept; pass --storage URL"):
        run_sweep(config, tmp_path / "out", progress=False)


def test_figures_are_printed_where_characters_are_few(finished: Path) -> None:
    call = [sys.executable, "-m", "flowkit.cli", "sweep", "best", str(finished)]
    done = subprocess.run(call, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"euler, 1 step, w = 1" in done.stdout


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write everywhere
    with pytest.raises(PermissionError, match="cannot be written; choose another folder"):
        run_sweep(SMALL, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_reference_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere.npz"):
        run_sweep(sweep(reference="nowhere.npz"), tmp_path / "out", progress=False)
    with pytest.raises((ValueError, FileNotFoundError), match="no/model"):
        run_sweep(sweep(model="./no/model"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_trackers_get_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    run_sweep(sweep(trackers=["tensorboard"], axes={"steps": [1, 2]}), tmp_path / "out", progress=False)
    (run,) = (tmp_path / "out" / "trackers").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert [event.value for event in events.Scalars("evaluations")] == [1, 2]
    with pytest.raises(ValueError, match='"diary", which accelerate does not have; choose'):
        run_sweep(sweep(trackers=["diary"]), tmp_path / "other", progress=False)
    with pytest.raises(ImportError, match="the tracker 'aim' is not installed: pip install aim"):
        run_sweep(sweep(trackers=["aim"]), tmp_path / "third", progress=False)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'a sweep needs optuna: pip install "flowkit-diffusion\[sweep\]"'):
        run_sweep(SMALL)


def test_guidance_grid_files_students_and_stock_schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that may be swept, over one model saved as two folders."""
    monkeypatch.chdir(tmp_path)
    flowkit.Grid.uniform(3).save("three.json")
    student = flowkit.load_demo("digits")
    student.scheduler.set_grid(flowkit.Grid.load("three.json"))
    flowkit.save_pretrained(student, "student")
    axes = [
        {"model": ["student", "digits"], "solver": ["euler"], "grid": ["three.json"]},
        {"model": ["student"]},
        {"scheduler": ["FlowMatchEulerDiscreteScheduler"], "model": ["digits"], "steps": [2]},
        {
            "model": ["digits"], "steps": [4], "guidance_scale": [2.0],
            "guidance": [
                {"method": "AdaptiveGuidance", "threshold": -1.5},
                {"method": "IntervalGuidance", "low": 0.3, "high": 0.8},
                {"method": "ProjectedGuidance"},
            ],
        },
    ]  # fmt: skip
    config = {**SMALL, "axes": axes}
    del config["model"]
    entries = run_sweep(config, "out", progress=False)
    assert [entry.error for entry in entries] == [None] * 7
    found = {entry.cell.name: entry.result["spec"] for entry in entries if entry.cell and entry.result}
    calls = {name: spec["network_evaluations"] for name, spec in found.items()}
    assert sorted(calls.values()) == [2, 3, 3, 3, 5, 6, 8]
    stock = next(spec for name, spec in found.items() if "FlowMatch" in name)
    assert stock["pipeline"]["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    projected = next(spec for name, spec in found.items() if "Projected" in name)
    assert projected["pipeline"]["attached"][0]["scale"] == 2.0
    assert read_config(config).cells()[0].get("model") == "student"


def test_a_text_to_image_model_with_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, a LoRA beside none, guidance methods, stock and our solvers; each cell finds the model as it was saved."""
    pipe = tiny.build("sd15", DDIMScheduler(clip_sample=False, steps_offset=1))
    pipe.save_pretrained(tmp_path / "sd")
    pipe.unet = copy.deepcopy(pipe.unet)  # other tests have the same
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v"]))
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.unet))
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flowkit.eval.make_statistics(images, PixelExtractor(3, grid=2), progress=False).save(
        tmp_path / "reference.safetensors"
    )
    monkeypatch.chdir(tmp_path)
    config = {
        "name": "text", "model": "sd", "reference": "reference.safetensors", "images": 6, "batch_size": 3, "keep": 2,
        "prompts": ["a cat", "a dog"], "call": {"height": 16, "width": 16, "negative_prompt": "blurry"}, "steps": 3,
        "axes": [
            {"lora": ["none", "lora/pytorch_lora_weights.safetensors"], "solver": ["euler", "dpm++2m"]},
            {"scheduler": ["keep"], "guidance_scale": [1.0, 5.0]},
            {"guidance_scale": [5.0], "guidance": [{"method": "AdaptiveGuidance", "threshold": -1.5}]},
        ],
    }  # fmt: skip
    entries = run_sweep(config, "out", progress=False)
    assert [(entry.state, entry.error) for entry in entries] == [("done", None)] * 7
    found = {entry.cell.name: entry.result for entry in entries if entry.cell and entry.result}
    sha = {name: result["spec"]["samples"]["sha256"] for name, result in found.items()}
    weights = {name: result["spec"]["pipeline"]["weights_sha256"] for name, result in found.items()}
    assert len(set(sha.values())) == 7
    assert [len({w for n, w in weights.items() if ("LoRA" in n) == lora}) for lora in (False, True)] == [1, 1]
    assert len(set(weights.values())) == 2
    calls = {name: result["spec"]["network_evaluations"] for name, result in found.items()}
    assert sorted(calls.values()) == [3, 4, 6, 6, 6, 6, 6]
