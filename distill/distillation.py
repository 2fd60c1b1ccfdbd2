"""What a distillation does, whatever its method: checks, records, trains, measures, saves, round by round."""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from flowkit.analytic import MixtureDenoiser
from flowkit.distill import card, folders, stage, trainer
from flowkit.distill import student as students
from flowkit.distill.card import Score
from flowkit.distill.conditions import Conditions
from flowkit.distill.draw import Draw
from flowkit.distill.fine import Runs
from flowkit.distill.method import Method, check_whole, sampler
from flowkit.distill.pairs import Held
from flowkit.distill.real import Beside, Real
from flowkit.distill.settings import Training
from flowkit.distill.shards import Trajectories
from flowkit.distill.student import LoRA
from flowkit.distill.teacher import check_pairs, check_unguided, scale_of, unguided
from flowkit.distill.trajectories import record
from flowkit.distill.watch import Pairs, Watch
from flowkit.eval.harness import evaluate
from flowkit.eval.processes import Processes
from flowkit.eval.provenance import describe, fingerprint, hash_inputs
from flowkit.eval.runs import write_json
from flowkit.grids import Grid
from flowkit.pipelines import ClassConditionalPipeline
from flowkit.pipelines.sampling import Inputs, as_inputs, parameters
from flowkit.progress import bar

_FORMAT = "flowkit.distill/2"
SAMPLES = 10_000
# Held out of the training, to watch it: a twentieth, of so many at most.
_HELD_OUT, _MOST = 20, 200
_PICTURES = 20


class Distillation:
    """A run of a method: what it was asked for, checked, and what it does; arguments as of `flowkit.distill.run`."""

    def __init__(
        self,
        method: Method,
        teacher: Any,  # noqa: ANN401
        inputs: Inputs,
        samples: int | None,
        call: Mapping[str, Any] | None,
        pairs: str | os.PathLike[str] | None,
        student: nn.Module | None,
        lora: LoRA | None,
        real: Any,  # noqa: ANN401
        training: Training,
        watched: Mapping[str, Any],
        seed: int,
        batch_size: int,
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        check_whole(batch_size=batch_size, **({} if samples is None else {"samples": samples}))
        self.method, self.teacher, self.call, self.lora = method, teacher, dict(call or {}), lora
        self.training, self.seed, self.batch_size, self.given = training, seed, batch_size, student
        self.watched = watched
        if inputs is None and isinstance(teacher, ClassConditionalPipeline):
            inputs = range(teacher.num_classes)
        self.inputs = inputs
        self.pairs = None if pairs is None else Trajectories(pairs)
        least = len(inputs) if isinstance(inputs, Sized) and not isinstance(inputs, Mapping) else 0
        known = max(SAMPLES, least) if self.pairs is None else len(self.pairs)
        self.samples = known if samples is None else samples
        if self.pairs is not None and self.samples > known:
            raise ValueError(
                f"{self.pairs.folder} holds {known} samples, and samples={self.samples}; leave samples out"
            )
        held_out = min(_MOST, self.samples // _HELD_OUT)
        self.held_out = range(self.samples - held_out, self.samples)
        self.real = None if real is None else Real(teacher, real, self.call, seed)
        self.trained = [*range(self.samples - held_out), *range(self.samples, self.samples + self._reals)]

    @property
    def _reals(self) -> int:
        """Number of real images, whose conditioning comes after that of the samples."""
        return 0 if self.real is None else len(self.real)

    def settings(self) -> dict[str, Any]:
        """Returns all that the student depends on, in JSON's terms."""
        scheduler = {k: v for k, v in describe(dict(self.teacher.scheduler.config)).items() if not k.startswith("_")}
        found = {
            "format": _FORMAT,
            "method": self.method.name,
            "options": describe(asdict(self.method)),  # type: ignore[call-overload]
            "samples": self.samples,
            "inputs_sha256": hash_inputs(as_inputs(self.teacher, self.inputs), self.samples),
            "call": describe(self.call),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "training": self.training.result(),
            "lora": None if self.lora is None else describe(asdict(self.lora)),
            "network": None if self.given is None else type(self.given).__qualname__,
            "pairs": None if self.pairs is None else self.pairs.run,
            "teacher": type(self.teacher).__qualname__,
            "teacher_sha256": fingerprint(self.teacher),
            "scheduler": scheduler,
        }
        if self.real is not None:
            found["real"] = self.real.description
        return dict(json.loads(json.dumps(found)))

    def prepare(self, work: Path, processes: Processes, progress: bool) -> Conditions:
        """Refuses what cannot be distilled, before hours are spent, and captures the conditioning of every input.

        Raises:
            TypeError, ValueError, OSError: as of `run`.
        """
        processes.agree(lambda: self._check(processes))

        own = as_inputs(self.teacher, self.inputs)

        def given(index: int) -> Any:  # noqa: ANN401
            return own(index) if self.real is None or index < self.samples else self.real.inputs(index - self.samples)

        def captured(show: bool) -> Conditions:
            with bar(show) as display:
                task = display.add_task("inputs", total=None)
                return Conditions(
                    self.teacher, given, self.samples + self._reals, call=self.call, batch_size=self.batch_size,
                    folder=work / folders.CONDITIONS, on_input=lambda rows: display.advance(task, rows),
                )  # fmt: skip

        predict = processes.agree(lambda: captured(progress and processes.main))
        processes.agree(lambda: self._check_student(predict))
        return predict

    def _check(self, processes: Processes) -> None:
        students.check(self.teacher, self.how)
        network = getattr(self.teacher, students.denoiser_name(self.teacher))
        weightless = isinstance(network, MixtureDenoiser) or not any(True for _ in network.parameters())
        if self.given is None and weightless:
            raise ValueError(f"the teacher's {type(network).__name__} has no weights that a student could train; pass student=, a "
                             "network that is called like it")  # fmt: skip
        if self.given is not None and self.lora is not None:
            raise ValueError("lora adapts the teacher's network, and student is another; give one of them")
        if self.given is not None and not isinstance(self.given, ModelMixin):
            raise TypeError(f"the student is a {type(self.given).__name__}, which could not be saved in a diffusers folder; derive "
                            "it from diffusers' ModelMixin and ConfigMixin")  # fmt: skip
        stage.check_reference(self.watched["reference"])
        if stage.sharded() and self.method.rounds > 1:
            raise ValueError(f"rounds={self.method.rounds}: a student in shards (FSDP) is in step on all processes, which "
                             "recording is not; run a round at a time, with the student as the next teacher")  # fmt: skip
        if self.real is not None and not self.method.of_ends:
            raise ValueError(
                f"{self.method.name} learns from whole trajectories, and of a real image only its noise is known; leave out real, "
                "or take reflow or onestep"
            )
        if self.method.encodes and self.watched["reference"] is not None:
            raise ValueError(f"a student of {self.method.name} draws no samples to measure; leave out reference")
        trainer.check(network if self.given is None else self.given, self.training, processes.count)

    def _check_student(self, predict: Conditions) -> None:
        self.method.check(predict)
        if self.real is not None:
            self.real.check(predict)
        if predict.guided:
            check_unguided(self.teacher, self.inputs, self.call)
        if self.pairs is not None:
            check_pairs(self.pairs, self.teacher, self.inputs, self.call)
        if self.given is not None:
            pipe = students.around(self.teacher, self.given, self.teacher.scheduler)
            try:
                Conditions(pipe, self.inputs, 1, call=self.call)
            except Exception as error:
                raise ValueError(f"the student, a {type(self.given).__name__}, cannot take the place of the teacher's network: it "
                                 f"needs to be called and to return alike ({error})") from error  # fmt: skip

    @property
    def how(self) -> students.How:
        """Full or LoRA."""
        return "full" if self.lora is None else self.lora

    def carry_out(self, predict: Conditions, work: Path, processes: Processes, progress: bool) -> None:
        """All rounds: records, trains, measures, and saves the last student into the folder."""
        show = progress and processes.main
        alone = self.teacher
        if self.given is not None or stage.sharded():  # the teacher's own network stays whole
            network = self.given if self.given is not None else copy.deepcopy(predict.network)
            alone = students.around(self.teacher, network, self.teacher.scheduler)
        call = unguided(self.teacher, self.call) if predict.guided else dict(self.call)
        settings = self.settings()  # of the teacher without adapters
        processes.agree(lambda: self._forecast(alone, predict, work, processes, show))
        data = self._recorded(self.teacher, self.call, predict, work, 1, progress)
        data = self._beside(data, predict, predict.network, work, 1, processes, show)
        with students.prepared(alone, self.how, self.seed) as network:
            network.to(self.teacher.device)
            for number in range(1, self.method.rounds + 1):
                scheduler = self.method.scheduler(self.teacher.scheduler, data)
                pipe, folder = students.around(alone, network, scheduler), work / f"training-{number}"
                loss = self.method.loss(predict, data, self.trained)
                looks = self._looks(pipe, call, data, folder)
                with students.sampling(network, next(predict.network.parameters()).dtype):
                    trained = stage.train(
                        network,
                        loss,
                        self.training,
                        folder,
                        seed=self.seed,
                        looks=looks,
                        processes=processes,
                        show=show,
                    )
                    if number < self.method.rounds:
                        data = self._recorded(pipe, call, predict, work, number + 1, progress)
                        data = self._beside(data, predict, network, work, number + 1, processes, show)
            own = []
            if looks is not None and looks.reference is not None:
                own.append(stage.score("student", looks, self.training, network))
            with students.as_teacher(self.teacher):
                scores = [*own, *self._scores(data, looks)]

            def save() -> None:
                whole = self.given if self.given is not None else predict.network
                saved = students.around(self.teacher, whole, self.teacher.scheduler) if stage.sharded() else alone
                stage.save(saved, trained, self.how, scheduler, folder, work, self.seed)
                plain = {k: v for k, v in call.items() if v is None or isinstance(v, (bool, int, float, str))}
                used = {"steps": self.method.steps or None, "call": plain}
                write_json(work / folders.SETTINGS, {**settings, "student": used})
                self._card(predict, call, data, scores, folder, work)

            processes.agree(lambda: save() if processes.main else None)

    def _forecast(self, alone: Any, predict: Conditions, work: Path, processes: Processes, show: bool) -> None:  # noqa: ANN401
        """Says what the run will take, and refuses a disk without room."""
        runs = Runs(self.teacher, self.method.solver, inputs=self.inputs, call=self.call, batch_size=self.batch_size)
        wanted = self.method.recording(runs, predict.guided)
        kept = len(wanted.grid) + 1 if wanted.at is None else len(wanted.at)
        bytes_of = math.prod(predict.shape) * predict.dtype.itemsize * kept * len(wanted.keep)
        blocks = runs.blocks(range(self.samples))
        runs.scheduler.set_grid(wanted.grid)
        one = Grid.uniform(1, runs.scheduler.path) if runs.scheduler.path.name not in ("ve", "edm") else runs.anchors(1)
        updates = [trainer.steps_done(work / f"training-{k + 1}") for k in range(self.method.rounds)]
        draws = 0 if self.pairs is not None else len(blocks) * runs.evaluations(wanted.grid)
        if self.real is not None:
            draws += math.ceil(self.real.evaluations(predict, wanted.grid) / self.batch_size)
            bytes_of = math.ceil(bytes_of * (1 + self._reals / self.samples))
        with students.prepared(alone, self.how, self.seed) as network:
            network.to(self.teacher.device)
            stage.forecast(
                network, lambda network, draw: self._trial(predict, network, draw), self.training, work, sum(updates), alone,
                self.lora is not None, processes, show, draw=lambda: list(runs.ends(one, blocks[0])),
                draws=draws // processes.count, pairs=bytes_of * self.samples, rounds=self.method.rounds,
            )  # fmt: skip

    def _trial(self, predict: Conditions, network: nn.Module, draw: Draw) -> tuple[Tensor, None]:
        """As much work as an update, whatever the method."""
        x = draw.normal(*predict.shape).to(self.teacher.device)
        s = torch.full((len(x),), predict.start / 2)
        return predict(network, x, s, draw.indices(self.samples)).square().flatten(1).mean(1), None

    def _recorded(
        self,
        pipe: Any,  # noqa: ANN401
        call: Mapping[str, Any],
        predict: Conditions,
        work: Path,
        number: int,
        progress: bool,
    ) -> Trajectories:
        """What is recorded of the teacher of a round."""
        if self.pairs is not None and number == 1:
            return self.pairs
        runs = Runs(pipe, self.method.solver, inputs=self.inputs, call=call, batch_size=self.batch_size)
        wanted = self.method.recording(runs, predict.guided and number == 1)
        return record(
            pipe, work / f"pairs-{number}", self.samples, wanted.grid, solver=self.method.solver, inputs=self.inputs, call=call,
            keep=wanted.keep, at=wanted.at, seed=self.seed + number - 1, batch_size=self.batch_size, progress=progress,
        )  # fmt: skip

    def _beside(
        self,
        data: Trajectories,
        predict: Conditions,
        network: nn.Module,
        work: Path,
        number: int,
        processes: Processes,
        show: bool,
    ) -> Trajectories:
        """Pairs of a round, and after them those of real images, where there are any."""
        if self.real is None:
            return data
        with bar(show) as display:
            task = display.add_task("noise of real images", total=None)
            real = self.real.record(
                predict, network, data, work / f"real-{number}", self.samples, self.batch_size, processes,
                lambda rows, total: display.update(task, advance=rows, total=total),
            )  # fmt: skip
        return Beside(data, real, self.samples)

    def _looks(self, pipe: Any, call: Mapping[str, Any], data: Trajectories, folder: Path) -> Watch | None:  # noqa: ANN401
        if self.method.encodes:
            return None
        held = None
        if len(self.held_out) > 1 and "latents" in parameters(pipe):
            noise, samples = Held(data, self.held_out)(torch.arange(len(self.held_out))).unbind(1)
            held = Pairs(noise, samples, self.held_out)
        nodes = 0 if self.method.steps else 16  # at levels that it was not trained at a student says nothing
        return Watch(
            pipe, folder, self.method.steps or 1, inputs=self.inputs, call=call, pictures=min(_PICTURES, self.samples), pairs=held,
            nodes=nodes, seed=self.seed, batch_size=self.batch_size, **self.watched,
        )  # fmt: skip

    def _scores(self, data: Trajectories, looks: Watch | None) -> list[Score]:
        """Fréchet distances of the teacher, at as many steps as the student and as it was recorded."""
        if self.watched["reference"] is None or looks is None:
            return []
        found = []
        recorded = data.scheduler()
        recorded.set_grid(data.grid)
        kinds = (("teacher", looks.steps, sampler(self.teacher.scheduler)),
                 (f"teacher as recorded ({recorded.method.name})", len(data.grid), recorded))  # fmt: skip
        for name, steps, scheduler in kinds:
            pipe = students.around(self.teacher, getattr(self.teacher, self._component), scheduler)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
                result = evaluate(
                    pipe, self.watched["reference"], self.watched["num_images"], seed=self.seed, inputs=self.inputs,
                    call={**self.call, "num_inference_steps": steps}, batch_size=self.batch_size, progress=False,
                )  # fmt: skip
            found.append(Score(name, steps, result.figure("fid")))
        return found

    def _card(
        self,
        predict: Conditions,
        call: Mapping[str, Any],
        data: Trajectories,
        scores: Sequence[Score],
        folder: Path,
        work: Path,
    ) -> None:
        """Writes the model card."""
        own = as_inputs(self.teacher, self.inputs)(0)
        example: dict[str, Any] = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str))}
        if isinstance(self.teacher, ClassConditionalPipeline):
            example = {"class_labels": [own["class_labels"]]}
        elif not example and "prompt" in parameters(self.teacher):
            example = {"prompt": "..."}
        name = scale_of(self.teacher)
        scale = self.call.get(name, parameters(self.teacher)[name].default) if predict.guided else None
        reference = self.watched["reference"]
        options = describe(asdict(self.method))  # type: ignore[call-overload]
        options |= {"evaluations": len(data.grid)} if "evaluations" in options else {}
        options |= {} if self.real is None else {"real images": len(self.real)}
        card.write(
            work,
            card.Facts(
                method=self.method.name,
                teacher=card.named(self.teacher, self.lora is not None),
                pipeline=type(self.teacher).__name__,
                steps=self.method.steps or 1,
                updates=self.training.steps * self.method.rounds,
                example=example,
                call={k: v for k, v in call.items() if isinstance(v, (bool, int, float, str))},
                component=self._component,
                guidance=None if scale is None else float(scale),
                pairs=len(data),
                settings={**options, **self.training.result(), "seed": self.seed},
                lora=None if self.lora is None else students.LORA_FILE,
                encoder=self.method.encodes,
                scores=scores,
                measured=f"{self.watched['num_images']:,} images against {describe(reference)}" if scores else "",
                **stage.course(folder, work, self.training),
            ),
        )

    @property
    def _component(self) -> str:
        return students.denoiser_name(self.teacher)

    def load(self, folder: Path) -> Any:  # noqa: ANN401
        """Returns the student of a finished run."""
        around = self.teacher
        if self.given is not None:
            around = students.around(self.teacher, self.given, self.teacher.scheduler)
        return students.load(folder, around)
