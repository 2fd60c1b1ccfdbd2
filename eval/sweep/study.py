"""The cells of a sweep as trials of an Optuna study, which any number of workers on any number of machines share.

Every cell has a slot, which is put into the study once, as a waiting trial: of a grid with its settings, of a search without any,
for the sampler to choose when its turn comes. A worker claims a waiting trial and shows by its heartbeat that it lives. A trial
whose worker died is closed, and its slot waits again, to be gone on with where it was.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url

from flowkit import rng
from flowkit.eval.metrics import lower_is_better
from flowkit.eval.provenance import first_difference
from flowkit.eval.sweep.axes import Range
from flowkit.eval.sweep.cells import Cell
from flowkit.eval.sweep.config import SweepConfig
from flowkit.eval.sweep.storage import alive, bury_the_dead, identity, open_storage, reachable, take

_OPEN = (TrialState.WAITING, TrialState.RUNNING)
_PATIENCE = 60  # seconds to wait for the worker that has just made the study

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the sweep shows its own progress


@dataclass(frozen=True)
class Claim:
    """A cell that is this worker's to measure."""

    slot: int
    cell: Cell
    trial: Trial


@dataclass(frozen=True)
class Entry:
    """A slot as it stands.

    Attributes:
        slot: its number.
        state: what is known of it.
        cell: its settings; None where a search has not chosen them yet.
        result: figures and record, see `flowkit.eval.results.Result.to_json`; None where it is not done.
        error: why it failed.
        worker: who has it.
    """

    slot: int
    state: Literal["waiting", "running", "done", "failed"]
    cell: Cell | None = None
    result: Mapping[str, Any] | None = None
    error: str | None = None
    worker: str | None = None


class Study:
    """A sweep's slots in a database.

    Args:
        config: the sweep.
        url: of the database, see `storage_url`.

    Raises:
        OSError: for a database that cannot be reached or written.
    """

    def __init__(self, config: SweepConfig, url: str) -> None:
        self.config, self.url = config, url
        self._cells = config.cells() if config.search.sampler == "grid" else None
        self._choices = config.choices() if self._cells is None else _values(self._cells)
        self.slots = len(self._cells) if self._cells is not None else int(config.search.trials or 0)
        self._name = str(config.name)
        with reachable(url):
            self._storage = open_storage(url, config.heartbeat)
        self._study: optuna.Study

    def open(self, make: bool = True) -> None:
        """Finds the study, or makes it with its waiting slots.

        Args:
            make: whether a study that is not there is made.

        Raises:
            FileNotFoundError: where there is none and none shall be made.
            ValueError: for a study of that name with another configuration; says what differs.
            OSError: for a database that cannot be reached.
        """
        with reachable(self.url):
            made = make and self._make()
            self._load()
            described = json.loads(json.dumps(self.config.describe()))
            before = None if made else self._described()
            if before is None and make:  # new, or its maker died at once
                self._study.set_user_attr("config", described)
            if before is not None and (found := first_difference(before, described)):
                place, old, new = found
                raise ValueError(f"the study {self._name!r} is of another configuration: {place} was {old!r:.80}, now it is "
                                 f"{new!r:.80}; give this one another name and another output")  # fmt: skip
            if made:
                self._fill({})

    def _make(self) -> bool:
        """Makes the study; tells whether it was not there before."""
        directions = [
            StudyDirection.MINIMIZE if lower_is_better(key) else StudyDirection.MAXIMIZE
            for key in self.config.objectives
        ]
        try:
            optuna.create_study(storage=self._storage, study_name=self._name, directions=directions)
        except optuna.exceptions.DuplicatedStudyError:
            return False
        return True

    def _load(self, slot: int = 0) -> None:
        """Opens the study anew, with a sampler for a slot; an old one would show its sampler the trials of its first day."""
        sampler = _sampler(self.config, slot)
        try:
            self._study = optuna.load_study(storage=self._storage, sampler=sampler, study_name=self._name)
        except KeyError:
            raise FileNotFoundError(
                f"no study {self._name!r} in {make_url(self.url)!r}; run the sweep first: flowkit sweep run FILE"
            ) from None

    def _described(self) -> Any:  # noqa: ANN401
        """The configuration of the study, which its maker may be about to write."""
        for _ in range(_PATIENCE):
            if (found := self._study.user_attrs.get("config")) is not None:
                return found
            time.sleep(1)
        return None  # its maker died at once

    def _current(self) -> dict[int, list[FrozenTrial]]:
        """Trials by slot, once the dead are buried and every slot that is to be done waits or has a worker."""
        while True:
            trials = self._trials()
            running = [t for t in itertools.chain.from_iterable(trials.values()) if t.state == TrialState.RUNNING]
            if not (bury_the_dead(self._study, self._storage, running) or self._fill(trials)):
                return trials

    def _fill(self, trials: Mapping[int, Sequence[FrozenTrial]]) -> int:
        """Puts a waiting trial where a slot has none that is open or done; returns how many."""
        empty = [slot for slot in range(self.slots) if self._state(trials.get(slot, ())) is None]
        for slot in empty:
            self._enqueue(slot, trials.get(slot, ()))
        return len(empty)

    def _enqueue(self, slot: int, before: Sequence[FrozenTrial]) -> None:
        if self._cells is not None:
            params = {axis: _choice(value) for axis, value in self._cells[slot].settings.items()}
        else:  # what a sampler chose stays, so that the work done is of use
            params = next((dict(trial.params) for trial in reversed(before) if trial.params), {})
        self._study.enqueue_trial(params, user_attrs={"slot": slot})

    def _trials(self) -> dict[int, list[FrozenTrial]]:
        """Trials by slot, in order."""
        found: dict[int, list[FrozenTrial]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if "slot" in trial.user_attrs and "withdrawn" not in trial.user_attrs:
                found.setdefault(trial.user_attrs["slot"], []).append(trial)
        return found

    def _state(self, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The trial that says how a slot stands; None where it should wait and has nothing waiting."""
        for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING):
            if found := next((trial for trial in trials if trial.state == state), None):
                return found
        last = trials[-1] if trials else None
        if last is None:
            return None
        return last if "error" in last.user_attrs or self._lost(trials) > self.config.retries else None

    def _lost(self, trials: Sequence[FrozenTrial]) -> int:
        """How often the slot's worker died."""
        return sum(not {"error", "stopped"} & trial.user_attrs.keys() for trial in trials)

    def claim(self) -> Claim | None:
        """Takes the next waiting cell; None where none waits.

        Raises:
            OSError: for a database that cannot be reached.
        """
        with reachable(self.url):
            trials = self._current()
            waiting = [t for slot in range(self.slots) for t in trials[slot] if t.state == TrialState.WAITING]
            for trial in sorted(waiting, key=lambda trial: trial.number):
                if not take(self._storage, trial._trial_id):
                    continue
                slot = trial.user_attrs["slot"]
                if self._cells is None:
                    self._load(slot)
                    trials = self._trials()
                mine = Trial(self._study, trial._trial_id)
                mine.set_user_attr("worker", identity())
                # Older ones that waited a moment ago have a worker now, or this one would have taken them.
                others = [other for other in trials[slot] if other.number != trial.number]
                if any(
                    o.state == TrialState.COMPLETE or (o.state in _OPEN and o.number < trial.number) for o in others
                ):
                    mine.set_user_attr("withdrawn", True)  # two workers had put the same slot back
                    self._study.tell(mine, state=TrialState.FAIL)
                    continue
                return Claim(slot, self._settle(mine, slot), mine)
            return None

    def _settle(self, trial: Trial, slot: int) -> Cell:
        """The cell of a trial; has a search choose."""
        chosen = {name: self._suggest(trial, name, among) for name, among in self._choices.items()
                  if self._cells is None or name in self._cells[slot].settings}  # fmt: skip
        return self.config.cell(chosen) if self._cells is None else self._cells[slot]

    def _suggest(self, trial: Trial, name: str, among: Sequence[Any] | Range) -> Any:  # noqa: ANN401
        if isinstance(among, Range):
            if among.whole:
                return trial.suggest_int(
                    name, int(among.low), int(among.high), step=int(among.step or 1), log=among.log
                )
            return trial.suggest_float(name, among.low, among.high, step=among.step, log=among.log)
        labels = [_choice(value) for value in among]
        return among[labels.index(trial.suggest_categorical(name, labels))]

    def alive(self, claim: Claim) -> AbstractContextManager[None]:
        """Shows the others that this worker lives while it measures."""
        return alive(self._storage, claim.trial._trial_id)

    def finish(self, claim: Claim, values: Sequence[float], result: Mapping[str, Any]) -> bool:
        """Writes a cell's figures.

        Args:
            claim: the cell.
            values: of the objectives.
            result: see `Entry`.

        Returns:
            Whether they count: not where this worker was taken for dead, and another has the cell.
        """
        return self._tell(claim, TrialState.COMPLETE, {"result": dict(result)}, list(values))

    def fail(self, claim: Claim, error: str) -> bool:
        """Writes why a cell failed, for good; returns whether that counts, as `finish` does."""
        return self._tell(claim, TrialState.FAIL, {"error": error})

    def give_back(self, claim: Claim) -> None:
        """Gives a cell back, because its worker stops."""
        self._tell(claim, TrialState.FAIL, {"stopped": True})

    def _tell(
        self, claim: Claim, state: TrialState, attributes: Mapping[str, Any], values: list[float] | None = None
    ) -> bool:
        with reachable(self.url):
            try:
                for name, value in attributes.items():
                    claim.trial.set_user_attr(name, value)
                self._study.tell(claim.trial, values, state, skip_if_finished=True)
            except optuna.exceptions.UpdateFinishedTrialError:
                # It was taken for dead, and another worker has the slot, who will find the work in the folder.
                return False
        return True

    def retry_failed(self) -> int:
        """Lets failed cells wait again; returns how many."""
        with reachable(self.url):
            trials = self._current()
            failed = [slot for slot in range(self.slots) if self._entry(slot, trials[slot]).state == "failed"]
            for slot in failed:
                self._enqueue(slot, trials[slot])
            return len(failed)

    def entries(self) -> list[Entry]:
        """Returns the slots as they stand, in order.

        Raises:
            OSError: for a database that cannot be reached.
        """
        with reachable(self.url):
            trials = self._trials()
        return [self._entry(slot, trials.get(slot, [])) for slot in range(self.slots)]

    def _entry(self, slot: int, trials: Sequence[FrozenTrial]) -> Entry:
        trial = self._state(trials)
        cell = self._cell_of(slot, trials)
        if trial is None or trial.state == TrialState.WAITING:
            return Entry(slot, "waiting", cell)
        worker = (trial.user_attrs.get("worker") or {}).get("name")
        if trial.state == TrialState.RUNNING:
            return Entry(slot, "running", cell, worker=worker)
        if trial.state == TrialState.COMPLETE:
            return Entry(slot, "done", cell, result=trial.user_attrs["result"], worker=worker)
        killed = f"its worker was killed {self._lost(trials)} times; too little memory is the usual reason"
        return Entry(slot, "failed", cell, error=trial.user_attrs.get("error", killed), worker=worker)

    def _cell_of(self, slot: int, trials: Sequence[FrozenTrial]) -> Cell | None:
        if self._cells is not None:
            return self._cells[slot]
        params = next((trial.params for trial in reversed(trials) if trial.params.keys() >= self._choices.keys()), None)
        if params is None:
            return None
        return self.config.cell(
            {
                name: params[name]
                if isinstance(among, Range)
                else among[[_choice(v) for v in among].index(params[name])]
                for name, among in self._choices.items()
            }
        )


def _values(cells: Sequence[Cell]) -> dict[str, list[Any] | Range]:
    """What occurs in a grid, by setting: Optuna wants the same choices in all trials."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for name, value in cell.settings.items():
            found.setdefault(name, {})[json.dumps(value, sort_keys=True)] = value
    return {name: list(values.values()) for name, values in found.items()}


def _sampler(config: SweepConfig, slot: int) -> optuna.samplers.BaseSampler:
    """What chooses the cells of a search, with a seed of the slot, so that workers do not choose alike; a grid has no choice."""
    seed = rng.sample_seed(config.search.seed, slot) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.search.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)
        if config.search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def _choice(value: Any) -> Any:  # noqa: ANN401
    """A value of an axis as Optuna holds it: what is no scalar as JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)
