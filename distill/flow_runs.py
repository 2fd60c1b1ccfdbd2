"""`train_flow`: a flow trained from data, and its folder, which is complete or absent.

While a training is unfinished everything lies in ``<output>.unfinished``. The model is saved there too, and then the folder takes
its final name.

    distill.json    what the model depends on
    README.md       how it was made, how to use it, what was measured
    training        its course: training.json, training.png, pictures; averages, where profiles were kept
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from flowkit.distill import card, couplings, flow_data, folders, objective, stage, student, trainer
from flowkit.distill.conditions import Conditions
from flowkit.distill.draw import Draw
from flowkit.distill.encode import Encoder
from flowkit.distill.feed import Feed, default_workers
from flowkit.distill.flow import FlowLoss
from flowkit.distill.flow_data import Material
from flowkit.distill.settings import Training
from flowkit.distill.watch import Pairs, Watch
from flowkit.eval.processes import Processes
from flowkit.eval.provenance import describe, fingerprint
from flowkit.eval.references import Reference
from flowkit.pipelines import ClassConditionalPipeline
from flowkit.pipelines.sampling import parameters
from flowkit.progress import bar
from flowkit.schedulers import RectifiedFlowScheduler

TRAINING = "training"
_COMPARED, _BLOCK = 200, 16  # images that samples are compared with, and are read at a time
_FORMAT = "flowkit.flow/1"


def train_flow(
    pipe: Any,  # noqa: ANN401
    data: Any,  # noqa: ANN401
    *,
    output: str | os.PathLike[str],
    training: Training,
    init: Literal["random", "weights"] = "random",
    lora: student.LoRA | None = None,
    times: str | Sequence[float] = "uniform",
    coupling: str = "independent",
    dropout: float = 0.1,
    flip: bool = False,
    size: int | None = None,
    alpha: str = "refuse",
    split: str = "train",
    image_column: str | None = None,
    condition_column: str | None = None,
    call: Mapping[str, Any] | None = None,
    sample_steps: int = 16,
    reference: Reference = None,
    num_images: int = 2_000,
    workers: int | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Any:  # noqa: ANN401
    """Trains a flow on images, see `flowkit.distill.flow`, and saves it as a diffusers folder, or a LoRA.

    It may be killed at any moment: called again with the same arguments it goes on, and on one machine ends with the same bits; a
    finished training is loaded at once. Processes started by ``accelerate launch`` share each batch.

    Args:
        pipe: says architecture, path and prediction, and how conditions reach the network; it is left as it was. Pixels or latents
            of single images; its network must have weights.
        data: see `flowkit.distill.data.open_examples`.
        output: folder of the model, which loads like any pipeline.
        training: the settings, number of updates and batch size among them.
        init: "random", new weights of the same configuration; or "weights", to go on from the pipeline's own.
        lora: adapters that are trained in the place of all weights; needs ``init="weights"``.
        times: law of the flow times, see `flowkit.distill.objective.times`.
        coupling: of noise and images, see `flowkit.distill.couplings.couple`: within each class. Each process then reads and
            encodes the whole batch. Refused with captions, which no two images share.
        dropout: how often the condition is left out, in [0, 1], for guidance.
        flip: mirror half of the images.
        size: pixels along each side, to which images are resized and cut (`flowkit.eval.resize.pil_crop`); None means the
            pipeline's own.
        alpha: what becomes of transparent images: "refuse", "white", "black" or "drop".
        split: of `datasets`.
        image_column: of `datasets`; None means the one of images.
        condition_column: of `datasets`; None means "label", or "text", "caption" or "prompt".
        call: further arguments of the pipeline for all conditions, such as ``dict(guidance_scale=3.5)`` of a network that is told.
        sample_steps: denoising steps of the samples that are looked at.
        reference: what their Frechet distance is measured against, see `flowkit.eval.evaluate`; None measures none.
        num_images: of each Frechet distance.
        workers: processes that decode ahead; None means one for each core but one, 8 at most.
        seed: of weights, order, noise and times.
        resume: go on where an earlier call stopped; False removes what it left.
        progress: print an estimate of the time, then bars with the time left.

    Returns:
        The trained pipeline, loaded from the folder, on the given one's device.

    Raises:
        FileNotFoundError, ImportError, TypeError: for data that cannot be read, or an extra that they need.
        OSError: for a folder that cannot be written, or a disk without room.
        ValueError: for unknown names and numbers out of range; images without a condition that the pipeline takes; a pipeline that
            cannot be trained; a folder of something else, or of other settings; a broken image; a loss that is not finite, which
            keeps the last checkpoint.
    """
    columns = {"split": split, "image_column": image_column, "condition_column": condition_column}
    look = {"steps": sample_steps, "reference": reference, "num_images": num_images}
    workers = default_workers() if workers is None else workers
    job = _Job(pipe, training, init, lora, times, coupling, dropout, flip, look, workers, seed)
    folder, work = Path(output), Path(output).with_name(f"{Path(output).name}.unfinished")
    processes = Processes.join(torch.device(pipe.device))
    material = processes.agree(
        lambda: flow_data.prepare(pipe, data, size=size, alpha=alpha, call=call or {}, **columns)
    )
    settings = processes.agree(lambda: job.settings(material))
    if not (folder / folders.SETTINGS).is_file():
        processes.agree(lambda: material.examples.check(material.decoding) if processes.main else None)
    finished = processes.agree(lambda: folders.open_folder(folder, work, settings, resume) if processes.main else False)
    if not processes.share(finished):
        job.carry_out(material, work, processes, progress)
        processes.agree(lambda: folders.finish(work, folder) if processes.main else None)
        processes.wait()
    return student.load(folder, pipe)


@dataclass(frozen=True)
class _Job:
    """A training: what it was asked for, and what it does."""

    pipe: Any
    training: Training
    init: str
    lora: student.LoRA | None
    times: str | Sequence[float]
    coupling: str
    dropout: float
    flip: bool
    look: Mapping[str, Any]
    workers: int
    seed: int

    def __post_init__(self) -> None:
        if self.init not in ("random", "weights"):
            raise ValueError(f"unknown init {self.init!r}; choose random or weights")
        if self.lora is not None and self.init == "random":
            raise ValueError(
                "a LoRA adapts weights that are there, and init='random' makes new ones; pass init='weights'"
            )
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is a probability, got {self.dropout!r}; 0.1 is usual")
        if self.workers < 0 or isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(
                f"got workers={self.workers}, seed={self.seed!r}; workers is at least 0, seed a whole number"
            )
        objective.times(self.times)
        couplings.check(self.coupling)
        student.check(self.pipe, self._how)
        if not any(True for _ in self._network.parameters()):
            raise ValueError(
                f"the {type(self._network).__name__} of {type(self.pipe).__name__} has no weights to train"
            )
        stage.check_reference(self.look["reference"])
        trainer.check(self._network, self.training, Processes.join(torch.device(self.pipe.device)).count)

    @property
    def _how(self) -> student.How:
        return "full" if self.lora is None else self.lora

    @property
    def _network(self) -> nn.Module:
        network: nn.Module = getattr(self.pipe, student.denoiser_name(self.pipe))
        return network

    def settings(self, material: Material) -> dict[str, Any]:
        """Returns all that the model depends on, in JSON's terms.

        Raises:
            ValueError: for a coupling that would be none.
        """
        if self.coupling != "independent" and len(material.inputs) > 1 and "prompt" in material.inputs[0]:
            raise ValueError(f"coupling={self.coupling!r} exchanges noise among images of one condition, and captions are no "
                             "classes; leave it out")  # fmt: skip
        scheduler = {k: v for k, v in describe(dict(self.pipe.scheduler.config)).items() if not k.startswith("_")}
        found = {
            "format": _FORMAT,
            "method": "flow",
            "data": material.examples.description,
            "classes": material.examples.classes,
            "call": describe(material.call),
            "init": self.init,
            "lora": None if self.lora is None else describe(asdict(self.lora)),
            "times": describe(self.times),
            "coupling": self.coupling,
            "dropout": self.dropout,
            "flip": self.flip,
            "seed": self.seed,
            "training": self.training.result(),
            "pipeline": type(self.pipe).__qualname__,
            "pipeline_sha256": fingerprint(self.pipe),
            "scheduler": scheduler,
        }
        return dict(json.loads(json.dumps(found)))

    def carry_out(self, material: Material, work: Path, processes: Processes, progress: bool) -> None:
        """Captures the conditions, trains, and saves the model with its card into the folder."""
        show, inputs, folder = progress and processes.main, material.inputs, work / TRAINING

        def captured() -> Conditions:
            with bar(show) as display:
                task = display.add_task("conditions", total=len(inputs))
                return Conditions(
                    self.pipe, lambda i: inputs[i], len(inputs), call=material.call, folder=work / folders.CONDITIONS,
                    on_input=lambda rows: display.advance(task, rows),
                )  # fmt: skip

        predict = processes.agree(captured)
        encode = processes.agree(lambda: Encoder(self.pipe, predict.shape))
        processes.agree(lambda: encode.check(material.examples[0], lambda i: inputs[i], material.call))
        scheduler: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(self.pipe.scheduler)
        with student.prepared(self._apart(), self._how, self.seed) as network:
            if self.init == "random":
                network.load_state_dict(_fresh(network, self.seed).state_dict())
            network.to(self.pipe.device)
            loss = self._loss(predict, material, encode, processes)
            done, lora = trainer.steps_done(folder), self.lora is not None
            processes.agree(
                lambda: stage.forecast(network, loss, self.training, work, done, self.pipe, lora, processes, show)
            )
            model = student.around(self.pipe, network, scheduler)
            looks = processes.agree(lambda: self._looks(model, predict, encode, material, folder))
            with student.sampling(network, next(predict.network.parameters()).dtype):
                trained = stage.train(
                    network, loss, self.training, folder, seed=self.seed, looks=looks, processes=processes, show=show
                )
            loss.feed.close()
            scores = [] if looks.reference is None else [stage.score("this model", looks, self.training, network)]

            def save() -> None:
                stage.save(self.pipe, trained, self._how, scheduler, folder, work, self.seed)
                self._card(material, scores, folder, work)

            processes.agree(lambda: save() if processes.main else None)

    def _apart(self) -> Any:  # noqa: ANN401
        """The pipeline with a network that may be cut into shards; its own stays whole."""
        if not stage.sharded():
            return self.pipe
        return student.around(self.pipe, copy.deepcopy(self._network), self.pipe.scheduler)

    def _loss(self, predict: Conditions, material: Material, encode: Encoder, processes: Processes) -> FlowLoss:
        batch = self.training.batch_size
        parts = [range(batch)]
        if self.coupling == "independent":
            parts = self.training.parts(processes.count, processes.rank)
        feed = Feed(material.examples, batch, self.seed, parts, flip=self.flip, workers=self.workers)
        return FlowLoss(
            predict, feed, encode, material.numbers, material.null, self.dropout, objective.times(self.times), self.coupling,
            self.seed,
        )  # fmt: skip

    def _looks(self, model: Any, predict: Conditions, encode: Encoder, material: Material, folder: Path) -> Watch:  # noqa: ANN401
        shown = [material.inputs[number] for number in material.shown]
        return Watch(
            model, folder, inputs=lambda i: shown[i % len(shown)], call=material.call, nodes=0, seed=self.seed,
            pairs=self._images(model, predict, encode, material), **self.look,
        )  # fmt: skip

    def _images(self, model: Any, predict: Conditions, encode: Encoder, material: Material) -> Pairs | None:  # noqa: ANN401
        """Images whose mean and variance the samples should have; None where guidance means to change these."""
        count = min(_COMPARED, len(material.examples))
        if count < 2 or predict.guided or "latents" not in parameters(model):
            return None
        try:
            scale = model.scheduler.fork().plan(self.look["steps"], None, None, None).start
        except ValueError:  # dynamic shifting: where a run begins is the pipeline's to say
            return None
        chosen = torch.linspace(0, len(material.examples) - 1, count).round().long().tolist()
        noise, samples = [], []
        for first in range(0, count, _BLOCK):
            draw = Draw(self.seed, 0, count, range(first, min(first + _BLOCK, count)))
            images = torch.stack([material.examples[chosen[row]] for row in draw.rows])
            samples.append(encode(images, draw.normal).cpu())
            noise.append(draw.normal(*predict.shape) * scale)
        places = [material.shown.index(int(material.numbers[i])) for i in chosen]
        return Pairs(torch.cat(noise), torch.cat(samples), places, matched=False)

    def _card(self, material: Material, scores: Sequence[card.Score], folder: Path, work: Path) -> None:
        """Writes the model card."""
        example = dict(material.inputs[material.shown[0]])
        if isinstance(self.pipe, ClassConditionalPipeline):
            example = {"class_labels": [example["class_labels"]]}
        steps, reference = self.look["steps"], self.look["reference"]
        own = ("init", "times", "coupling", "dropout", "flip", "seed")
        card.write(
            work,
            card.Facts(
                method="flow",
                teacher=card.named(self.pipe, self.lora is not None) if self.init == "weights" else None,
                pipeline=type(self.pipe).__name__,
                steps=steps,
                updates=self.training.steps,
                example=example,
                call={k: v for k, v in material.call.items() if isinstance(v, (bool, int, float, str))},
                component=student.denoiser_name(self.pipe),
                images=len(material.examples),
                settings={**{name: getattr(self, name) for name in own}, **self.training.result()},
                lora=None if self.lora is None else student.LORA_FILE,
                scores=scores,
                measured=f"{self.look['num_images']:,} images against {describe(reference)}" if scores else "",
                **stage.course(folder, work, self.training),
            ),
        )


def _fresh(network: Any, seed: int) -> nn.Module:  # noqa: ANN401
    """A network of the same configuration with new weights, the same for a seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made: nn.Module = type(network).from_config(network.config)
    return made
