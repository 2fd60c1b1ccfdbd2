"""Evolution of genomes in an Optuna study: one search, shared by any number of workers, which goes on where it stopped.

Optuna's are the study in its database, the workers' trials and heartbeats, and NSGA-II's generations and elitism (Deb et al. 2002;
of one objective here: the parents are the best of the last generation and its parents). Ours are the first generation, how a child
is made of its parents, and the rule that no genome is evaluated twice:

- the first generation is the seeds, seeds with one thing changed, and random genomes;
- most children are one of the best genomes so far with one thing changed, a local search; the others mix two parents, the better
  of two drawn each, and half of those are changed as well. Where only time steps are searched, some are the grid that a sum of
  costs of single steps, fitted to all errors so far, takes for the best (`flowkit.distill.additive`). What is known is drawn anew.

A child is a function of the seed and of the genomes evaluated before it, so one worker ends the same however often it was killed;
several workers depend on who comes first.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from flowkit import rng
from flowkit.distill.additive import likely_path
from flowkit.distill.genome import Draw, Genome, Space
from flowkit.eval.provenance import first_difference
from flowkit.eval.sweep.storage import alive, bury_the_dead, identity, take

POPULATION = 10
_FITTED = 0.5  # share of guesses of the fitted costs among children
_LOCAL, _BEST = (
    0.7,
    0.7,
)  # share of local search among children; probability that it begins at the best genome, not the next
_TRIES = 100  # before a child that is always known gives way to a random genome
_PATIENCE = 60  # seconds to wait for the worker that has just made the study
_LIVE = (TrialState.COMPLETE, TrialState.RUNNING)

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the search shows its own progress


class Evolution:
    """A search of limited length.

    Args:
        space: what is searched.
        seed: of all draws.
        storage: of the study; None keeps it in memory.
        name: of the study.
        settings: what the errors depend on, values of JSON; a study of that name with others is refused.

    Raises:
        ValueError: for such a study.
    """

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        storage: BaseStorage | None = None,
        name: str = "steps",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.space, self._seed, self._name = space, seed, name
        self._storage: BaseStorage = storage or InMemoryStorage()
        self._known: dict[int, Genome | None] = {}  # by trial
        self._first: list[Genome] = []
        self._study = self._open(json.loads(json.dumps(settings or {})))

    @property
    def found(self) -> dict[Genome, float]:
        """Error of each genome evaluated so far, in order."""
        found: dict[Genome, float] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if (genome := self._genome_of(trial)) is not None and trial.value is not None:
                found.setdefault(genome, trial.value)
        return found

    def once(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Returns a value of JSON that the study keeps, made where it has none of that name."""
        key = hashlib.sha256(name.encode()).hexdigest()  # a name of an attribute must be short
        if (value := self._study.user_attrs.get(key)) is None:
            value = make()
            self._study.set_user_attr(key, value)
        return value

    def run(
        self,
        seeds: Sequence[Genome],
        error: Callable[[Genome], float],
        trials: int,
        show: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Evaluates genomes until so many are known, those of other workers among them, and waits for those.

        Args:
            seeds: genomes to begin with.
            error: of a genome; the same genome must give the same number.
            trials: number of genomes, >= 1; a space that has fewer is evaluated whole.
            show: called with the number known so far.
        """
        trials = min(trials, self.space.size)
        self._first = self._generation(seeds)
        while True:
            show(min(trials, len(self.found)))
            if (claim := self._claim(trials)) is not None:
                trial, genome = claim
                try:
                    with alive(self._storage, trial._trial_id):
                        value = error(genome)
                except BaseException:
                    self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                    raise
                # A worker that was taken for dead finds its trial closed, and the genome in another.
                self._study.tell(trial, value, skip_if_finished=True)
            elif self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                time.sleep(1)  # others finish theirs
            else:
                return

    def _open(self, settings: Mapping[str, Any]) -> optuna.Study:
        """Finds the study, or makes it."""
        try:
            study = optuna.create_study(storage=self._storage, study_name=self._name)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=self._storage, study_name=self._name)
            before = _settings(study)
            if before is not None and (found := first_difference(before, settings)):
                place, old, new = found
                raise ValueError(f"the study {self._name!r} is of another search: {place} was {old!r:.80}, now it is {new!r:.80}; "
                                 "choose another output") from None  # fmt: skip
        study.set_user_attr("settings", settings)
        return study

    def _generation(self, seeds: Sequence[Genome]) -> list[Genome]:
        """The first generation."""
        found, draw = list(dict.fromkeys(seeds)), np.random.default_rng(rng.sample_seed(self._seed, -1))
        while len(found) < min(POPULATION, self.space.size):
            near = seeds and draw.random() < 0.5
            genome = (
                self.space.mutated(draw, seeds[int(draw.integers(len(seeds)))]) if near else self.space.random(draw)
            )
            if genome not in found:
                found.append(genome)
        return found

    def _claim(self, trials: int) -> tuple[Trial, Genome] | None:
        """Takes a waiting genome, or has a child made; None where enough are taken."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        bury_the_dead(self._study, self._storage, running)
        # Loaded anew: an old study would show its sampler the trials of its first day.
        breeder = _Breeder(self.space, self._seed, self._genome_of)
        self._study = optuna.load_study(storage=self._storage, sampler=breeder, study_name=self._name)
        self._fill()
        while len(self._study.get_trials(deepcopy=False, states=_LIVE)) < trials:
            for waiting in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                if take(self._storage, waiting._trial_id):
                    return self._begin(Trial(self._study, waiting._trial_id), trials) or self._claim(trials)
            self._study.enqueue_trial({})
        return None

    def _fill(self) -> None:
        """Puts a waiting trial where a genome of the first generation has none; its worker may have died."""
        states = (*_LIVE, TrialState.WAITING)
        there = {self._genome_of(trial) for trial in self._study.get_trials(deepcopy=False, states=states)}
        for genome in self._first:
            if genome not in there:
                self._study.enqueue_trial(self.space.parameters(genome))

    def _begin(self, trial: Trial, trials: int) -> tuple[Trial, Genome] | None:
        """Settles the genome of a trial that was taken; None where another worker has the same, or the last one."""
        trial.set_user_attr("worker", identity())
        _ = trial.relative_params  # has NSGA-II count it in its generation
        chosen = {name: trial._suggest(name, kind) for name, kind in self.space.distributions.items()}
        genome = self.space.genome(chosen)
        assert genome is not None
        # Whoever settles last sees the other, whatever their numbers; where both do, both give way and choose anew.
        others = [o for o in self._study.get_trials(deepcopy=False, states=_LIVE) if o.number != trial.number]
        enough = sum(other.number < trial.number for other in others) >= trials
        if not enough and all(self._genome_of(other) != genome for other in others):
            return trial, genome
        self._study.tell(trial, state=TrialState.FAIL)
        return None

    def _genome_of(self, trial: FrozenTrial) -> Genome | None:
        if trial.number not in self._known:
            genome = self.space.genome(trial.params) or self.space.genome(trial.system_attrs.get("fixed_params", {}))
            if trial.state != TrialState.COMPLETE:
                return genome
            self._known[trial.number] = genome
        return self._known[trial.number]


class _Breeder(optuna.samplers.NSGAIISampler):
    """NSGA-II whose children are genomes that nobody has evaluated."""

    def __init__(self, space: Space, seed: int, genome_of: Callable[[FrozenTrial], Genome | None]) -> None:
        self._space, self._seed, self._genome_of = space, seed, genome_of
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(population_size=POPULATION, seed=0, child_generation_strategy=self._child)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns the parameters of every genome."""
        return self._space.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns a child; without parents, where others still evaluate the first generation, a random genome or a local change."""
        return super().sample_relative(study, trial, search_space) or self._child(study, search_space, [])

    def _child(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], parents: Sequence[FrozenTrial]
    ) -> dict[str, Any]:
        space, values, taken = self._space, dict[Genome, float](), set[Genome]()
        for trial in study.get_trials(deepcopy=False, states=_LIVE):
            if (known := self._genome_of(trial)) is not None:
                taken.add(known)
                if trial.value is not None:
                    values[known] = trial.value
        draw = np.random.default_rng(rng.sample_seed(self._seed, len(taken)))
        ranked = sorted(values, key=lambda genome: (values[genome], genome))
        breeding = sorted({known for trial in parents if (known := self._genome_of(trial))}, key=ranked.index)
        if ranked and not space.scales and not space.skips and draw.random() < _FITTED:
            paths, errors = zip(*((genome.nodes, values[genome]) for genome in ranked), strict=True)
            guess = likely_path(paths, errors, draw if draw.random() < 0.5 else None, space.forbidden, space.forced)
            if Genome(guess) not in taken:
                return space.parameters(Genome(guess))
        for _ in range(_TRIES):
            genome = self._bred(draw, ranked, breeding)
            if genome not in taken:
                return space.parameters(genome)
        while (genome := space.random(draw)) in taken and len(taken) < space.size:
            pass
        return space.parameters(genome)

    def _bred(self, draw: Draw, ranked: Sequence[Genome], parents: Sequence[Genome]) -> Genome:
        space = self._space
        if ranked and (not parents or draw.random() < _LOCAL):
            return space.mutated(draw, ranked[min(int(draw.geometric(_BEST)), len(ranked)) - 1])
        if not parents:
            return space.random(draw)
        one, other = (parents[int(draw.integers(len(parents), size=2).min())] for _ in range(2))
        child = space.crossed(draw, one, other)
        return space.mutated(draw, child) if draw.random() < 0.5 else child


def _settings(study: optuna.Study) -> Any:  # noqa: ANN401
    """The settings of a study, which its maker may be about to write."""
    for _ in range(_PATIENCE):
        if (found := study.user_attrs.get("settings")) is not None:
            return found
        time.sleep(1)
    return None  # its maker died at once
