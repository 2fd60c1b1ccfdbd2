"""Recorded trajectories: what is in them, whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from flowkit import (
    ClassConditionalPipeline,
    Grid,
    MixtureDenoiser,
    RectifiedFlowScheduler,
    load_demo,
    optimize_steps,
    rng,
    table,
    weights,
)
from flowkit.distill import Trajectories, fine, record
from flowkit.distill.costs import Costs
from flowkit.distill.fine import RECORD
from flowkit.distill.trajectories import recorded_costs
from flowkit.eval.processes import Processes
from flowkit.eval.sources import count_rows

from . import mixtures
from .families import stock_of
from .test_bellman import ddpm
from .tiny import PIPELINES, build

ROOT = Path(__file__).resolve().parents[1]
QUIET: dict[str, Any] = {"inputs": [0], "progress": False}


@pytest.mark.parametrize("solver", ["euler", "unipc", "heun", "sde-dpm++2m"])
@pytest.mark.parametrize("make", [mixtures.ring, mixtures.planes])
def test_what_is_recorded_is_the_solvers_own_walk(tmp_path: Path, make: Any, solver: str) -> None:
    pipe = make()
    before = pipe.scheduler
    scheduler = RectifiedFlowScheduler.from_config(before, solver=solver, noise="keyed")
    data = record(pipe, tmp_path, 7, 6, solver=scheduler, batch_size=3, **QUIET)
    assert pipe.scheduler is before
    assert (len(data), data.at, data.outputs_at) == (7, list(range(7)), list(range(6)))
    assert data.grid.solver == solver
    for index in (0, 4, 6):
        item = data[index]
        assert (item["index"], item["inputs"]) == (index, {"class_labels": 0})
        seed = rng.sample_seed(rng.sample_seed(0, RECORD), index)
        shape = pipe.unet.config["shape"]
        x = rng.normal(shape, [seed], tag=rng.INITIAL, dtype=torch.float64)
        assert torch.equal(item["states"][:1], x)
        scheduler.set_grid(data.grid)
        history: tuple[torch.Tensor, ...] = ()
        for k, row in enumerate(scheduler.plan(6, None, None, None).rows()):
            raw = pipe.unet(x, row.time).sample
            if row.step == k or solver != "heun":
                assert torch.allclose(item["outputs"][k], raw[0], atol=1e-4)
            noise = rng.normal(shape, [seed], step=k, dtype=torch.float64) if row.c else None
            x, history = table.step(row, x, raw, history, noise)
        assert torch.allclose(item["states"][-1], x[0], atol=1e-4)


def test_noise_of_unbounded_paths_is_scaled(tmp_path: Path) -> None:
    network = MixtureDenoiser.of(torch.ones(1, 1, 2, 2), 0.3, path="edm")
    pipe = ClassConditionalPipeline(
        network, RectifiedFlowScheduler(path="edm", prediction_type="epsilon", solver="euler")
    )
    data = record(pipe, tmp_path, 4, 5, **QUIET)
    assert (data._shard(0).noise, data._shard(0).scale) == ("keyed", 80.0)
    assert 20 < float(data[3]["states"][0].abs().mean()) < 200
    assert data.scheduler().path.name == "edm"


def test_steps_inside_a_step_are_not_levels(tmp_path: Path) -> None:
    data = record(mixtures.gaussian(), tmp_path, 2, 4, solver="heun", **QUIET)
    states, levels = data[1]["states"].flatten(), torch.tensor(data.grid.sigmas, dtype=torch.float64)
    exact = states[0] * ((1 - levels).square() / 4 + levels.square()).sqrt()
    assert torch.allclose(states[:-1], exact[:-1], rtol=0.05)  # the last step, to sigma 0, is one of Euler
    assert states[2] != pytest.approx(float(states[1]), rel=0.1)


@pytest.mark.parametrize(("name", "noise"), [("digits", "keyed"), ("ddpm", "generator"), ("masked", "stored")])
def test_noise_is_made_again_and_not_stored(tmp_path: Path, name: str, noise: str) -> None:
    pipe: Any = ddpm() if name == "ddpm" else load_demo()
    inputs = None if name == "ddpm" else [3, 5]
    if name == "masked":  # a pipeline with noise of its own
        pipe.__class__ = type("Masked", (type(pipe),), {"__call__": _masked(type(pipe).__call__)})
    data = record(pipe, tmp_path, 5, 3, inputs=inputs, batch_size=2, progress=False)
    shard = data._shard(0)
    assert shard.noise == noise
    assert shard.states.shape[:2] == (5, 4 if noise == "stored" else 3)
    assert data[4]["states"].shape[:1] == (4,)
    # What comes back is what the pipeline began with.
    euler = RectifiedFlowScheduler.from_config(pipe.scheduler, solver=data.grid.solver)
    euler.set_grid(data.grid)
    rows = euler.plan(3, None, None, None).rows()
    states, outputs = data[4]["states"], data[4]["outputs"]
    if noise != "generator":  # DDPM clips
        assert torch.allclose(table.step(rows[0], states[0], outputs[0])[0], states[1], atol=1e-6)
    shard_file = tmp_path / "shard-000000.safetensors"
    size = 64 * 4
    assert shard_file.stat().st_size < 5 * size * (7 if noise == "stored" else 6) + 3000


def _masked(call: Any) -> Any:
    def masked(self: Any, class_labels: Any, num_inference_steps: int = 2, generator: Any = None, **kwargs: Any) -> Any:
        noise = torch.stack([torch.rand(1, 8, 8, generator=g) for g in generator])
        return call(self, class_labels, num_inference_steps=num_inference_steps, latents=noise, **kwargs)

    return masked


@pytest.mark.parametrize(
    ("keep", "at", "names"),
    [
        (["state"], [0, 4], {"states": 2}),
        (["state"], [4], {"states": 1}),
        (["output"], None, {"outputs": 4}),
        (["output", "state"], [1, 3, 4], {"states": 3, "outputs": 2}),
    ],
)
def test_part_of_a_trajectory(tmp_path: Path, keep: list[str], at: list[int] | None, names: dict[str, int]) -> None:
    whole = record(mixtures.ring(), tmp_path / "whole", 6, 4, batch_size=4, **QUIET)
    part = record(mixtures.ring(), tmp_path / "part", 6, 4, batch_size=4, keep=keep, at=at, **QUIET)
    for index in range(6):
        item = part[index]
        assert {name: len(item[name]) for name in ("states", "outputs") if name in item} == names
        for name, kept in (("states", part.at), ("outputs", part.outputs_at)):
            if name in item:
                assert torch.equal(item[name], whole[index][name][kept])


def test_costs_of_recorded_trajectories_are_those_of_a_search(tmp_path: Path) -> None:
    data = record(mixtures.planes(), tmp_path / "run", 7, 9, batch_size=3, **QUIET)
    costs = recorded_costs(data, batch_size=4)
    runs = fine.Runs(mixtures.planes(), inputs=[0], stream=RECORD)
    expected = Costs(runs.anchors(9), 7)
    fine.fine_solution(runs, runs.anchors(9), range(7), costs=expected)
    assert torch.allclose(costs.mean(), expected.mean(), rtol=1e-9)
    assert float(costs.mean()[0, 9]) > 1e-2
    part = record(mixtures.planes(), tmp_path / "part", 7, 9, at=[0, 3, 9], **QUIET)
    with pytest.raises(ValueError, match="holds states at 3 and outputs at 2 of 7 samples"):
        recorded_costs(part)
    noisy = record(mixtures.planes(), tmp_path / "noisy", 2, 4, solver="sde-dpm++2m", **QUIET)
    with pytest.raises(ValueError, match="drew noise at every step"):
        recorded_costs(noisy)


def test_a_loader_reads_batches(tmp_path: Path) -> None:
    data = record(load_demo(), tmp_path, 10, 2, inputs=range(10), batch_size=4, progress=False)
    batches = list(DataLoader(data, 4))
    assert [len(b["states"]) for b in batches] == [4, 4, 2]
    assert torch.cat([b["inputs"]["class_labels"] for b in batches]).tolist() == list(range(10))
    assert torch.equal(batches[1]["states"][2], data[6]["states"])
    sent = pickle.dumps(data)  # to a worker, with files mapped
    assert len(sent) < 5000
    assert torch.equal(pickle.loads(sent)[6]["states"], data[6]["states"])
    with pytest.raises(IndexError, match="sample 10 is not one of 10"):
        data[10]


def test_batches_do_not_change_what_is_recorded_but_rounding(tmp_path: Path) -> None:
    one, other = (record(mixtures.ring(), tmp_path / str(b), 9, 3, batch_size=b, **QUIET) for b in (2, 9))
    for index in range(9):
        assert torch.allclose(one[index]["states"], other[index]["states"], rtol=1e-9)


# ------------------------------------------------------------------------------------------------- faults


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    record(load_demo(), folder, 40, 4, inputs=range(10), batch_size=2, progress=False)
    assert len(list(folder.glob("shard-*"))) == 2  # of at most 16 batches
    return folder


# Imports once, then forks a recording that it kills after a time, again and again, and lets the last one end.
KILLER = """
import os, random, signal, sys, time
import torch
import flowkit
from flowkit.distill import record
torch.set_num_threads(1)
draw = random.Random(0)
pipe = flowkit.load_demo()
def run(name):
    record(pipe, sys.argv[1] + name, 80, 4, inputs=range(10), batch_size=2, progress=False)
def fork(name, seconds=None):
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        run(name)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - began
run("warm")
needed = fork("whole")[1]
for number in range(4):
    print(fork("killed", draw.uniform(0, needed / 3))[0])
print(fork("killed")[0])
"""


@pytest.mark.slow
def test_killed_at_four_moments(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLER, f"{tmp_path}/"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert out.count("-9") >= 2
    assert out[-1] == "0"
    assert len(contents(tmp_path / "whole")) == 5  # three shards, settings and index
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_stopped_between_any_two_files(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    replace, left = os.replace, 0

    def fail(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            shutil.copy(source, f"{source}x")  # what a kill leaves
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    for files in range(1, 8):  # settings, two shards and the index, each of which may be the last
        left, folder = files % 2, tmp_path / "run"
        try:
            record(load_demo(), folder, 40, 4, inputs=range(10), batch_size=2, progress=False)
            break
        except Killed:
            assert not (folder / "index.json").exists()
            with pytest.raises(FileNotFoundError, match="no complete recording"):
                Trajectories(folder)
    else:
        pytest.fail("it never ended")
    assert contents(folder) == contents(whole)


def test_a_finished_recording_draws_nothing(whole: Path) -> None:
    pipe = load_demo()
    with count_rows(pipe) as rows:
        data = record(pipe, whole, 40, 4, inputs=range(10), batch_size=2, progress=False)
        assert rows() == 1  # one evaluation tells the shape
    assert len(data) == 40


def damaged(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    file = target / "shard-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return target


def test_a_damaged_shard_is_named_and_alone_drawn_again(whole: Path, tmp_path: Path) -> None:
    folder = damaged(whole, tmp_path / "run")
    data = Trajectories(folder)
    _ = data[31]
    with pytest.raises(ValueError, match=r"the checksum of .*shard-000001.safetensors is not the one"):
        data[32]
    assert Trajectories(folder, verify=False)[39]["index"] == 39
    pipe = load_demo()
    how: dict[str, Any] = {"inputs": range(10), "batch_size": 2, "progress": False}
    with pytest.raises(ValueError, match=r"shard-000001.*delete it and record again"):
        record(pipe, folder, 40, 4, **how)
    (folder / "shard-000001.safetensors").unlink()
    with count_rows(pipe) as rows:
        record(pipe, folder, 40, 4, **how)
        assert rows() == 1 + 8 * 4
    assert contents(folder) == contents(whole)
    (folder / "shard-000000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"shard-000000.safetensors is corrupt, cut short"):
        Trajectories(folder)[0]


def test_a_shard_of_another_recording_is_refused(whole: Path, tmp_path: Path) -> None:
    record(load_demo(), tmp_path, 40, 4, inputs=range(10), batch_size=2, seed=1, progress=False)
    shutil.copy(whole / "shard-000000.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"shard-000000.safetensors belongs to another recording"):
        Trajectories(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": json.dumps([{"class_labels": 9}] * 8)}, "the checksum of"),
        ({"noise": "stored"}, "the checksum of"),
        ({"scale": "2.0"}, "the checksum of"),
        ({"scale": "x"}, "is damaged"),
        ({"noise": None}, "is damaged"),
    ],
)
def test_what_a_shard_says_is_under_its_checksum(
    whole: Path, tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    file = folder / "shard-000001.safetensors"
    tensors, metadata = weights.read(file)
    weights.write(file, tensors, metadata)
    assert Trajectories(folder)[32]["inputs"] == {"class_labels": 2}
    weights.write(file, tensors, {k: v for k, v in {**metadata, **change}.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        Trajectories(folder)[32]


def test_shards_in_one_anothers_place_are_noticed(tmp_path: Path) -> None:
    how: dict[str, Any] = {"batch_size": 1, "keep": ["output"], **QUIET}  # no noise that would tell
    record(mixtures.gaussian(), tmp_path, 32, 1, **how)
    one, other, aside = (tmp_path / f"{n}.safetensors" for n in ("shard-000000", "shard-000001", "aside"))
    for source, target in ((one, aside), (other, one), (aside, other)):
        source.rename(target)
    with pytest.raises(ValueError, match="the checksum of"):
        Trajectories(tmp_path)[0]
    with pytest.raises(ValueError, match="the checksum of"):
        record(mixtures.gaussian(), tmp_path, 32, 1, **how)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"count": 40, "shards": []}',
        '{"count": 40, "shards": [{"first": 0, "count": 8}, {"first": 32, "count": 8}]}',
        '{"count": 40, "shards": [{"first": "x", "count": 40}]}',
        f'{{"count": {10**30}, "shards": [{{"first": 0, "count": {10**30}}}]}}',
    ],
)
def test_an_index_that_does_not_list_the_samples_is_refused(whole: Path, tmp_path: Path, index: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index.json .*; record again"):
        Trajectories(folder)
    record(load_demo(), folder, 40, 4, inputs=range(10), batch_size=2, progress=False)
    assert contents(folder) == contents(whole)


def test_noise_that_comes_out_otherwise_is_noticed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, normal = Trajectories(whole), rng.normal
    monkeypatch.setattr(rng, "normal", lambda *args, **kwargs: normal(*args, **kwargs) * 1.0001)
    with pytest.raises(ValueError, match=r"the noise of .* comes out otherwise"):
        data[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "grid.sigmas"),
        ({"samples": 41}, "samples.count 40, this one has 41"),
        ({"seed": 1}, "samples.seed 0, this one has 1"),
        ({"keep": ["state"]}, "keep"),
        ({"solver": "euler"}, "grid.solver 'unipc', this one has 'euler'"),
        ({"call": {"guidance_scale": 2.0}}, "samples.call.guidance_scale None, this one has 2.0"),
        ({"batch_size": 4}, "batch_size 2, this one has 4"),
        ({"resume": False}, "holds recorded trajectories already"),
    ],
)
def test_another_recording_is_refused_by_name(whole: Path, change: dict[str, Any], message: str) -> None:
    how = {"samples": 40, "steps": 4, "inputs": range(10), "batch_size": 2, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        record(load_demo(), whole, **how)


def test_another_pipeline_is_refused_by_name(whole: Path) -> None:
    pipe = load_demo()
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(0.01)
    with pytest.raises(ValueError, match="weights_sha256"):
        record(pipe, whole, 40, 4, inputs=range(10), batch_size=2, progress=False)


def test_a_disk_without_room_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_demo()
    usage = shutil.disk_usage(tmp_path)
    needed = 40 * 9 * 64 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    how: dict[str, Any] = {"inputs": range(10), "batch_size": 2, "progress": False}
    with count_rows(pipe) as rows:
        with pytest.raises(
            OSError, match=r"the trajectories take 0.0 GB more, and .* has 0.0 GB left; choose another folder"
        ):
            record(pipe, tmp_path, 40, 4, **how)
        assert rows() == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert len(record(pipe, tmp_path, 40, 4, **how)) == 40


def test_a_disk_that_fills_up_loses_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, files = os.fsync, []

    def full(handle: int) -> None:
        files.append(handle)
        if len(files) == 3:  # settings, a shard, another shard
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    how: dict[str, Any] = {"inputs": range(10), "batch_size": 2, "progress": False}
    with pytest.raises(OSError, match=r"shard-000001.safetensors could not be written .*make room and record again"):
        record(load_demo(), tmp_path / "run", 40, 4, **how)
    assert sorted(contents(tmp_path / "run")) == ["shard-000000.safetensors", "trajectories.json"]
    record(load_demo(), tmp_path / "run", 40, 4, **how)
    assert contents(tmp_path / "run") == contents(whole)


class Ranks(Processes):
    """Processes that are not there: each rank runs alone, one after the other."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, work: Any) -> Any:
        return work()


def test_ranks_share_the_shards(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"inputs": range(10), "batch_size": 2, "progress": False}
    drawn: list[set[str]] = []

    def ranks() -> Iterator[Processes]:
        yield Ranks(0, 2)
        yield Ranks(1, 2)

    order = ranks()
    monkeypatch.setattr(Processes, "join", lambda device: next(order))
    with pytest.raises(
        FileNotFoundError, match="shard-000001"
    ):  # rank 0 has done its own, and finds the other's missing
        record(load_demo(), tmp_path / "run", 40, 4, **how)
    drawn.append({p.name for p in (tmp_path / "run").glob("shard*")})
    (tmp_path / "run" / "shard-000000.safetensors").rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match="no complete recording"):  # rank 1 does not write the index
        record(load_demo(), tmp_path / "run", 40, 4, **how)
    drawn.append({p.name for p in (tmp_path / "run").glob("shard*")})
    assert drawn == [{"shard-000000.safetensors"}, {"shard-000001.safetensors"}]
    assert (tmp_path / "run" / "shard-000001.safetensors").read_bytes() == (
        whole / "shard-000001.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_two_processes_leave_the_same_bytes_as_one(whole: Path, tmp_path: Path) -> None:
    script = "from flowkit import load_demo; from flowkit.distill import record; import sys; "
    script += "record(load_demo(), sys.argv[1], 40, 4, inputs=range(10), batch_size=2, progress=False)"
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path / "run")], env=env, check=True, capture_output=True
    )
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"keep": ["noise"]}, r"keep=\['noise'\]"),
        ({"keep": []}, r"keep=\[\]"),
        ({"at": [5]}, "from 0 to 4, got \\[5\\]"),
        ({"at": [2, 1]}, "rising"),
        ({"steps": 0}, "at least 1"),
        ({"steps": Grid((3.0, 0.0), "vp")}, "belongs to the path 'vp'"),
        ({"solver": "fast"}, "unknown solver 'fast'"),
        ({"call": {"sigmas": [1.0]}}, "sigmas cannot be in call"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    how = {"samples": 4, "steps": 4, **QUIET, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        record(mixtures.ring(), tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


def test_the_index_lists_the_shards(whole: Path) -> None:
    index = json.loads((whole / "index.json").read_text())
    assert index["count"] == 40
    assert [(s["file"], s["first"], s["count"]) for s in index["shards"]] == [
        ("shard-000000.safetensors", 0, 32),
        ("shard-000001.safetensors", 32, 8),
    ]


# ------------------------------------------------------------------------------------------------- pipelines of diffusers


def arguments(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of a sample and the arguments of all, in the pipeline of a family."""
    given = {k: v for k, v in PIPELINES[family].call.items() if k != "output_type"}
    return {k: given.pop(k) for k in ("prompt", "negative_prompt")}, given


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_text_pipelines(tmp_path: Path, family: str) -> None:
    pipe = build(family, stock_of(family))
    inputs, call = arguments(family)
    data = record(pipe, tmp_path / "run", 3, 4, inputs=inputs, call=call, batch_size=2, progress=False)
    assert data._shard(0).noise == ("stored" if family == "flux" else "generator")  # Flux packs its noise
    assert data[2]["inputs"] == inputs
    walked = [data[2]["states"][0][None]]
    scheduler = data.scheduler()
    scheduler.set_grid(data.grid)
    for k, row in enumerate(scheduler.plan(4, None, None, None).rows()):
        walked.append(table.step(row, walked[-1], data[2]["outputs"][k][None])[0])
    assert torch.allclose(torch.cat(walked), data[2]["states"], atol=1e-5)
    how: dict[str, Any] = {"inputs": inputs, "call": call, "batch_size": 2, "progress": False}
    decoded = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda *args: decoded.append(1))
    grid = optimize_steps(pipe, [2], anchors=6, samples=3, held_out=2, budget=8, **how)[2]
    handle.remove()
    assert not decoded  # no trial costs a decoder
    assert grid.path == ("vp" if family.startswith("sd1") or family == "sdxl" else "flow")
    assert grid.about["search_rmse"] <= grid.about["uniform_search_rmse"]


def test_a_pipeline_that_begins_in_the_middle_is_refused_by_name(tmp_path: Path) -> None:
    pipe = build("sd15-img2img", stock_of("sd15-img2img"))
    inputs, call = arguments("sd15-img2img")
    with pytest.raises(ValueError, match=r"StableDiffusionImg2ImgPipeline took 2 of 4 steps; .* pure noise"):
        record(pipe, tmp_path / "run", 2, 4, inputs=inputs, call=call, progress=False)
