"""What evaluation costs, ours beside torch-fidelity, SciPy and, where they are installed, pytorch-fid and torchmetrics.

    python benchmarks/eval.py                       # some ten minutes on one core; prints tables, writes benchmarks/eval.json
    python benchmarks/eval.py --compiled            # with torch.compile's extractor, which takes minutes to compile
    python benchmarks/eval.py --end-to-end cuda     # a pipeline with Inception, against PNG files and torch-fidelity, on a GPU

One process, one thread, per-thread CPU time, interleaved, medians. The network has random weights, the same for all: speed does not
depend on them. Peak memory is that of a process of its own, above what it held before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import diffusers
import numpy as np
import torch
import torch_fidelity
from torch_fidelity import metric_fid, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import flowkit
from flowkit.eval import InceptionExtractor
from flowkit.eval.exact import ExactStats
from flowkit.eval.frechet import FrechetReference
from flowkit.eval.inception import random_weights
from flowkit.eval.kid import kid
from flowkit.eval.neighbours import neighbours
from flowkit.eval.statistics import FeatureStats
from flowkit.weights import write_bytes

DIM, ROUNDS = 2048, 3
Figures = dict[str, float]


def timed(kinds: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> Figures:
    """Median seconds of CPU time of each, interleaved, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(rounds + 1):
        for name, call in kinds.items():
            start = time.thread_time()
            call()
            if round_:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def extractors(compiled: bool) -> Figures:
    """Images a second and core, of 64x64 uint8 images in batches of 16, resizing included."""
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(random_weights(0), file)
        theirs = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
        ).eval()
    kinds: dict[str, Callable[[], Any]] = {"torch-fidelity": lambda: theirs(images)}
    for mode in ("reference", "fast", *(["compiled"] if compiled else []), "onnx"):
        try:
            ours = InceptionExtractor.random(0, mode=mode)
        except ImportError as error:
            print(f"left out: {mode} ({error})")
            continue
        kinds[f"flowkit, {mode}"] = lambda ours=ours: ours(images)
    for peer in (_pytorch_fid, _torchmetrics):
        try:
            kinds |= peer(images)
        except ImportError as error:
            print(f"left out: {error}")
    with torch.no_grad():
        return {name: len(images) / seconds for name, seconds in timed(kinds).items()}


def _pytorch_fid(images: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """pytorch-fid's network, with the random weights in place of a download."""
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *_, **__: random_weights(0)
    network = inception.InceptionV3([3]).eval()
    return {"pytorch-fid": lambda: network(images / 255)}


def _torchmetrics(images: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The network of torchmetrics, likewise."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        torch.save(random_weights(0), Path(folder) / "weights.pth")
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(Path(folder) / "weights.pth"))
    return {"torchmetrics": lambda: network(images)}


def distances() -> Figures:
    """Seconds for a Frechet distance at d = 2048 of full-rank statistics of 3,000 features."""
    x, y = (
        torch.randn(3000, DIM, generator=torch.Generator().manual_seed(seed)).double() * (1 + seed) for seed in (0, 1)
    )
    (m1, s1), (m2, s2) = ((v.mean(0), v.T.cov()) for v in (x, y))
    arrays = [{"mu": m.numpy(), "sigma": s.numpy()} for m, s in ((m1, s1), (m2, s2))]
    reference = FrechetReference(m1, s1)

    def scipy() -> float:
        from scipy.linalg import sqrtm

        return float(np.trace(sqrtm(arrays[0]["sigma"] @ arrays[1]["sigma"]).real))

    return timed({
        "flowkit": lambda: FrechetReference(m1, s1).terms(m2, s2),
        "flowkit, reference factored before": lambda: reference.terms(m2, s2),
        "torch-fidelity": lambda: metric_fid.fid_statistics_to_metric(*arrays, verbose=False),
        "SciPy's sqrtm (pytorch-fid, clean-fid, EDM)": scipy,
    })  # fmt: skip


def sets() -> Figures:
    """Seconds for metrics of feature sets, 4,000 against 4,000 at d = 2048."""
    x, y = (torch.randn(4000, DIM, generator=torch.Generator().manual_seed(seed)).relu() for seed in (0, 1))
    found = timed({
        "flowkit: KID of all": lambda: kid(x, y),
        "torch-fidelity: KID of 100 subsets of 1000": lambda: metric_kid.kid_features_to_metric(
            x, y, kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False
        ),
        "flowkit: precision, recall, density, coverage": lambda: neighbours(x, y),
        "torch-fidelity: precision, recall": lambda: metric_prc.prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False),
    }, 1)  # fmt: skip
    batch = x[:1024]  # what exact sums are multiplied out for
    sums, exact = FeatureStats.empty(DIM), ExactStats.empty(DIM)
    per_image = timed(
        {
            "flowkit: sums, an image": lambda: sums.update(batch),
            "flowkit: exact sums, an image": lambda: exact.update(batch),
        },
        12,
    )
    return {**found, **{name: seconds / len(batch) for name, seconds in per_image.items()}}


def _peak(kind: str, count: int, answer: Any) -> None:  # noqa: ANN401
    """Megabytes that the statistics of ``count`` features take at most."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(500, DIM, generator=generator)
    before = _high_water()
    if kind == "torch-fidelity":  # keeps all features, then joins them, as its extraction does
        metric_fid.fid_features_to_statistics(torch.cat([batch.clone() for _ in range(count // len(batch))]))
    else:
        sums = ExactStats.empty(DIM) if kind == "exact" else FeatureStats.empty(DIM)
        for _ in range(count // len(batch)):
            sums.update(batch)
        sums.stats().covariance()
    answer.put(_high_water() - before)


def _high_water() -> float:
    """Most memory that this process has held, in megabytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def memory(count: int = 50_000) -> Figures:
    """Peak memory of the statistics of 50,000 features, in megabytes."""
    context, found = multiprocessing.get_context("spawn"), {}
    for kind in ("flowkit", "exact", "torch-fidelity"):
        answer = context.SimpleQueue()
        process = context.Process(target=_peak, args=(kind, count, answer))
        process.start()
        found[kind] = answer.get()
        process.join()
    return found


def end_to_end(device: str, count: int) -> dict[str, Figures]:
    """Images a second from noise to the Frechet distance: ours, and the pipeline with PNG files and torch-fidelity."""
    digits = flowkit.load_demo("digits").to(device)
    labels = list(range(10))
    big = diffusers.UNet2DModel(sample_size=32, num_class_embeds=11, block_out_channels=(128, 256, 256, 256),
                                down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    cifar = flowkit.ClassConditionalPipeline(big.eval(), flowkit.RectifiedFlowScheduler()).to(device)
    found: dict[str, Figures] = {}
    extractor = InceptionExtractor.random(0, device=device)
    reference = FeatureStats.empty(DIM, extractor.identity)
    reference.update(torch.randn(4000, DIM, generator=torch.Generator().manual_seed(0)))
    for name, pipe in (("digits UNet", digits), ("UNet of CIFAR's size, random", cifar)):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 8}

        def ours(pipe: Any = pipe, call: dict[str, Any] = call) -> None:  # noqa: ANN401
            flowkit.eval.evaluate(
                pipe, reference, count, extractor=extractor, inputs=labels, call=call, batch_size=250, progress=False
            )

        def theirs(pipe: Any = pipe, call: dict[str, Any] = call) -> None:  # noqa: ANN401
            with tempfile.TemporaryDirectory() as folder:
                weights = Path(folder) / "weights.pth"
                torch.save(random_weights(0), weights)
                images = Path(folder) / "images"
                images.mkdir()
                done = 0
                while done < count:
                    for image in pipe([i % 10 for i in range(min(250, count - done))], **call).images:
                        image.convert("RGB").save(images / f"{done:06d}.png")
                        done += 1
                torch_fidelity.calculate_metrics(
                    input1=str(images), cuda=device != "cpu", isc=True, batch_size=250, verbose=False, cache=False,
                    feature_extractor_weights_path=str(weights), isc_splits=1,
                )  # fmt: skip

        seconds = {}
        for kind, run in (("flowkit", ours), ("PNG and torch-fidelity", theirs)):
            run()
            start = time.perf_counter()
            run()
            seconds[kind] = count / (time.perf_counter() - start)
        found[name] = seconds
    return found


def table(found: dict[str, Any]) -> str:
    """The tables of docs/evaluation.md."""

    def rows(title: str, unit: str, figures: Figures, base: str, faster: bool, digits: int = 2) -> list[str]:
        lines = [f"| {title} | {unit} | |", "| --- | ---: | ---: |"]
        for name, value in figures.items():
            ratio = value / figures[base] if faster else figures[base] / value
            lines.append(f"| {name} | {value:.{digits}f} | {ratio:.1f}x |")
        return [*lines, ""]

    lines = rows(
        "Inception, 64 x 64 images, batches of 16", "images a second", found["extractors"], "torch-fidelity", True, 1
    )
    lines += rows("Frechet distance, d = 2048", "seconds", found["distances"], "torch-fidelity", False)
    sets = found["sets"]
    lines += ["| 4,000 against 4,000 features, d = 2048 | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in sets.items() if "image" not in name]
    lines += ["", "| sums of features, d = 2048 | microseconds an image |", "| --- | ---: |"]
    lines += [f"| {name.split(',')[0]} | {1e6 * value:.0f} |" for name, value in sets.items() if "image" in name]
    lines += ["", "| statistics of 50,000 features, d = 2048 | peak MB |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.0f} |" for name, value in found["memory"].items()]
    for name, figures in found.get("end_to_end", {}).get("figures", {}).items():
        lines += [
            "",
            *rows(
                f"{name}, noise to distance, {found['end_to_end']['device']}",
                "images a second",
                figures,
                "PNG and torch-fidelity",
                True,
                0,
            )[:-1],
        ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description="Measure what evaluation costs.")
    parser.add_argument("--table", action="store_true", help="print the tables of the committed JSON, measure nothing")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's extractor")
    parser.add_argument(
        "--end-to-end", metavar="DEVICE", help="only from noise to the distance, on this device; added to the JSON"
    )
    parser.add_argument("--images", type=int, default=10_000, help="of --end-to-end")
    given, file = parser.parse_args(), Path(__file__).with_suffix(".json")
    if given.table:
        print(table(json.loads(file.read_text())))
        return
    torch.set_num_threads(1)
    if given.end_to_end:
        found: dict[str, Any] = json.loads(file.read_text())
        name = torch.cuda.get_device_name() if given.end_to_end.startswith("cuda") else platform.machine()
        found["end_to_end"] = {
            "device": name,
            "images": given.images,
            "figures": end_to_end(given.end_to_end, given.images),
        }
    else:
        found = {"extractors": extractors(given.compiled), "distances": distances(), "sets": sets(), "memory": memory()}
        found["made_on"] = {
            "torch": torch.__version__,
            "torch_fidelity": torch_fidelity.__version__,
            "machine": platform.machine(),
            "threads": 1,
        }
    print(table(found))
    write_bytes(file, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
