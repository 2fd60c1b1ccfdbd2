"""The study of a sweep: every cell is measured once, whoever works on it and whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from flowkit.eval.sweep import storage
from flowkit.eval.sweep import study as study_module
from flowkit.eval.sweep.config import SweepConfig, read
from flowkit.eval.sweep.storage import storage_url
from flowkit.eval.sweep.study import Claim, Study

ROOT = Path(__file__).parent.parent


def sweep(**changes: Any) -> SweepConfig:
    """Six cells, unless told otherwise."""
    axes = {"solver": ["euler", "heun", "unipc"], "steps": [2, 4]}
    given = {"name": "six", "model": "digits", "reference": "digits", "images": 20, "labels": "0-9", "axes": axes}
    return read({**given, **changes})


def result(value: float) -> dict[str, Any]:
    return {"figures": {"fid": {"value": value, "se": None}}, "spec": {}}


@pytest.fixture
def url(server: str | None, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    yield storage_url(server, tmp_path)
    if server is not None:
        there = optuna.storages.RDBStorage(storage_url(server, tmp_path))
        for name in optuna.get_all_study_names(there):
            optuna.delete_study(study_name=name, storage=there)


def opened(config: SweepConfig, url: str) -> Study:
    study = Study(config, url)
    study.open()
    return study


def states(study: Study) -> list[str]:
    return [entry.state for entry in study.entries()]


def test_two_workers_share_the_cells_in_order(url: str) -> None:
    one, two = opened(sweep(), url), opened(sweep(), url)
    taken: list[Claim] = []
    while (claim := (one, two)[len(taken) % 2].claim()) is not None:
        taken.append(claim)
    assert [claim.slot for claim in taken] == list(range(6))
    assert [dict(claim.cell.settings) for claim in taken] == [dict(cell.settings) for cell in sweep().cells()]
    assert states(one) == ["running"] * 6
    for number, claim in enumerate(taken):
        (two, one)[number % 2].finish(claim, [number, 1.0], result(number))
    assert states(two) == ["done"] * 6
    assert [e.result["figures"]["fid"]["value"] for e in one.entries() if e.result] == [0, 1, 2, 3, 4, 5]
    assert one.claim() is None


WORKER = """
import sys
from flowkit.eval.sweep.config import read
from flowkit.eval.sweep.study import Claim, Study
import json, time
study = Study(read(json.loads(sys.argv[1])), sys.argv[2])
study.open()
while (claim := study.claim()) is not None:
    print(claim.slot, flush=True)
    time.sleep(float(sys.argv[3]))
    study.finish(claim, [1.0, 1.0], {"figures": {"fid": {"value": 1.0, "se": None}}, "spec": {}})
"""


def worker(config: SweepConfig, url: str, pause: float = 0) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", WORKER, json.dumps(config.source()), url, str(pause)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.slow
def test_processes_that_begin_together_do_every_cell_once(url: str) -> None:
    axes = {"steps": list(range(1, 13)), "solver": ["euler", "unipc"]}
    config = sweep(name="many", axes=axes)
    workers = [worker(config, url) for _ in range(3)]
    done = Counter(int(line) for one in workers for line in one.communicate(timeout=300)[0].split())
    assert [one.returncode for one in workers] == [0, 0, 0]
    assert done == Counter(range(24))
    assert states(opened(config, url)) == ["done"] * 24


def killed_in_a_cell(config: SweepConfig, url: str) -> int:
    """The cell that a worker had when it was killed."""
    dying = worker(config, url, pause=1000)
    assert dying.stdout is not None
    slot = int(dying.stdout.readline())
    dying.send_signal(signal.SIGKILL)
    dying.wait()
    return slot


def test_a_cell_of_a_process_that_is_no_more_waits_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = opened(sweep(), url), opened(sweep(), url)
    with monkeypatch.context() as gone:
        gone.setattr("flowkit.eval.sweep.study.identity", lambda: {**storage.identity(), "pid": 2**30, "started": 0.0})
        assert dead.claim() is not None
    taken = [claim.slot for claim in iter(alive.claim, None) if claim]
    assert sorted(taken) == list(range(6))


@pytest.mark.slow
def test_a_cell_whose_worker_was_killed_waits_again_at_once(url: str) -> None:
    study = opened(sweep(), url)
    assert killed_in_a_cell(sweep(), url) == 0
    assert states(study)[0] == "running"
    claim = study.claim()
    assert claim is not None
    others = []
    while (more := study.claim()) is not None:
        others.append(more.slot)
    assert sorted([claim.slot, *others]) == list(range(6))


@pytest.mark.slow
def test_a_worker_of_another_machine_is_missed_by_its_heartbeat(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep(heartbeat=1)
    study = opened(config, url)
    assert killed_in_a_cell(config, url) == 0
    monkeypatch.setattr(storage, "identity", lambda: {"space": "another machine"})
    first = study.claim()
    assert first is not None
    assert first.slot == 1  # the other may still live
    with study.alive(first):
        time.sleep(6)
        second = study.claim()
    slots = {first.slot}
    while second is not None:
        slots.add(second.slot)
        second = study.claim()
    assert slots == set(range(6))
    assert states(study) == ["running"] * 6  # none was taken from the one that lives


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_is_given_up(url: str) -> None:
    axes = {"steps": [2]}
    config = sweep(retries=1, axes=axes)
    for _ in range(2):
        assert killed_in_a_cell(config, url) == 0
    study = opened(config, url)
    assert study.claim() is None
    (entry,) = study.entries()
    assert entry.state == "failed"
    assert entry.error == "its worker was killed 2 times; too little memory is the usual reason"
    assert study.retry_failed() == 1
    assert study.claim() is not None


def test_failed_cells_stay_failed_until_they_are_asked_for(url: str) -> None:
    study = opened(sweep(), url)
    claims = [study.claim() for _ in range(6)]
    assert claims[0] is not None
    assert claims[1] is not None
    study.fail(claims[0], "ValueError: no")
    study.give_back(claims[1])
    assert [(entry.state, entry.error) for entry in study.entries()][:2] == [
        ("failed", "ValueError: no"),
        ("waiting", None),
    ]
    again = study.claim()
    assert again is not None
    assert again.slot == 1
    assert study.claim() is None
    assert study.retry_failed() == 1
    again = study.claim()
    assert again is not None
    assert again.slot == 0


def test_a_study_of_another_configuration_is_refused(url: str) -> None:
    opened(sweep(), url)
    opened(sweep(retries=5, keep=3), url)  # these decide nothing
    with pytest.raises(
        ValueError,
        match="'six' is of another configuration: images was 20, now it is 30; give",
    ):
        opened(sweep(images=30), url)
    with pytest.raises(FileNotFoundError, match=r"no study 'other' in .*; run the sweep first"):
        Study(sweep(name="other"), url).open(make=False)


def test_a_study_whose_maker_died_at_once_is_filled_by_the_next(url: str) -> None:
    study = opened(sweep(), url)
    there = optuna.storages.RDBStorage(url)
    optuna.delete_study(study_name="six", storage=there)
    made = optuna.create_study(study_name="six", storage=there, directions=["minimize", "minimize"])
    made.set_user_attr("config", sweep().describe())
    study = opened(sweep(), url)
    assert states(study) == ["waiting"] * 6
    claim = study.claim()
    assert claim is not None
    assert claim.slot == 0


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_search_has_as_many_cells_as_trials_and_stays_in_its_ranges(url: str, sampler: str) -> None:
    methods = [None, {"method": "AdaptiveGuidance", "threshold": 0.9}]
    axes = {
        "steps": {"low": 2, "high": 32, "log": True},
        "guidance_scale": {"low": 1.0, "high": 4.0},
        "guidance": methods,
    }
    config = sweep(search={"sampler": sampler, "trials": 12, "seed": 1}, axes=axes)
    workers = [opened(config, url), opened(config, url)]
    seen: list[tuple[int, tuple[str, ...]]] = []
    assert workers[0].entries()[3].cell is None
    while (claim := workers[len(seen) % 2].claim()) is not None:
        settings = claim.cell.settings
        assert 2 <= settings["steps"] <= 32
        assert 1 <= settings["guidance_scale"] <= 4
        assert settings["guidance"] in methods
        workers[0].finish(
            claim, [abs(settings["steps"] - 8) + settings["guidance_scale"], settings["steps"]], result(1.0)
        )
        seen.append((claim.slot, tuple(map(str, settings.values()))))
    assert [slot for slot, _ in seen] == list(range(12))
    assert len({values for _, values in seen}) > 6
    assert [entry.cell.settings["steps"] for entry in workers[1].entries() if entry.cell] == [
        int(v[0]) for _, v in seen
    ]


@pytest.mark.slow
def test_a_search_keeps_what_was_chosen_for_a_cell_whose_worker_died(url: str) -> None:
    axes = {"guidance_scale": {"low": 1.0, "high": 4.0}}
    config = sweep(search={"sampler": "random", "trials": 3}, axes=axes)
    assert killed_in_a_cell(config, url) == 0
    study = opened(config, url)
    (chosen,) = [entry.cell.settings for entry in study.entries() if entry.cell]
    claims = [study.claim() for _ in range(3)]
    assert [c.cell.settings for c in claims if c and c.slot == 0] == [chosen]


@pytest.mark.slow
def test_tpe_finds_more_than_chance() -> None:
    """On a bowl, with all trials of both samplers: the best of the second half."""

    def best(sampler: str, folder: Path) -> float:
        axes = {"guidance_scale": {"low": 1.0, "high": 100.0}, "knobs.eta": {"low": 0.0, "high": 100.0}}
        config = sweep(search={"sampler": sampler, "trials": 60}, objectives=["fid"], axes=axes)
        study = opened(config, storage_url(None, folder))
        values: list[float] = []
        while (claim := study.claim()) is not None:
            x, y = claim.cell.settings.values()
            values.append((x - 30) ** 2 + (y - 70) ** 2)
            study.finish(claim, [values[-1]], result(values[-1]))
        return sum(values[30:]) / 30

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        assert best("tpe", Path(one)) < 0.5 * best("random", Path(two))


@pytest.mark.parametrize("broken", ["postgresql://someone:secret@127.0.0.1:1/none", "sqlite:////nowhere/study.db"])
def test_a_database_that_cannot_be_reached_is_named_without_its_password(broken: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"the study's database .* cannot be used .*; check that it runs") as caught:
        opened(sweep(), storage_url(broken, tmp_path))
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="storage is no URL; write postgresql://"):
        storage_url("nonsense", tmp_path)


def test_a_worker_taken_for_dead_does_no_harm(url: str) -> None:
    axes = {"steps": [2]}
    one, two = opened(sweep(axes=axes), url), opened(sweep(axes=axes), url)
    slept = one.claim()
    assert slept is not None
    two._storage.set_trial_state_values(
        slept.trial._trial_id, optuna.trial.TrialState.FAIL
    )  # as its missing heartbeat would
    other = two.claim()
    assert other is not None
    assert not one.finish(slept, [1.0, 1.0], result(1.0))
    assert two.finish(other, [2.0, 1.0], result(2.0))
    (entry,) = two.entries()
    assert entry.result is not None
    assert entry.result["figures"]["fid"]["value"] == 2.0


def test_its_own_process_lives() -> None:
    me = storage.identity()
    assert me["pid"] == os.getpid()
    assert not storage.died_here(me)
    assert storage.died_here({**me, "started": me["started"] - 100})
    assert not storage.died_here({**me, "started": 0, "space": "elsewhere"})
    assert not storage.died_here(None)


def test_a_study_whose_maker_wrote_nothing_is_taken_over(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "_PATIENCE", 1)
    optuna.create_study(study_name="six", storage=storage.open_storage(url, 15), directions=["minimize", "minimize"])
    opened(sweep(), url)
    with pytest.raises(ValueError, match="another configuration: images was 20, now it is 30"):
        opened(sweep(images=30), url)


def test_a_search_of_fewer_trials_leaves_the_rest_waiting(url: str) -> None:
    axes = {"guidance_scale": {"low": 1.0, "high": 4.0}}
    opened(sweep(search={"sampler": "random", "trials": 6}, axes=axes), url)
    fewer = opened(sweep(search={"sampler": "random", "trials": 2}, axes=axes), url)
    slots = []
    while (claim := fewer.claim()) is not None:
        slots.append(claim.slot)
    assert slots == [0, 1]


def test_slots_that_two_workers_put_back_at_once_are_done_once(url: str) -> None:
    axes = {"steps": [2, 4]}
    one, two = opened(sweep(axes=axes), url), opened(sweep(axes=axes), url)
    before = one._trials()
    two._fill({slot: [] for slot in before})  # as if it had looked before the first filled
    claims: list[Claim] = []
    while (claim := (one, two)[len(claims) % 2].claim()) is not None:
        claims.append(claim)
    assert [claim.slot for claim in claims] == [0, 1]
    assert states(one) == ["running", "running"]
