"""Runs on disk: killed, resumed, shared by processes, refused, and always the same bits in the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import flowkit
from flowkit import assets
from flowkit.eval import PixelExtractor, Result, compare, evaluate, summarize
from flowkit.eval.images import images
from flowkit.eval.processes import PeerError, Processes
from flowkit.eval.runs import Spools
from flowkit.pipelines.sampling import sample_images

pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")
ROOT = Path(__file__).resolve().parents[1]
COUNT, BATCH = 330, 10
ARGUMENTS: dict[str, Any] = {
    "reference": "digits",
    "num_images": COUNT,
    "metrics": ["fid", "kid", "precision", "fid/pixels"],
    "inputs": list(range(10)),
    "call": {"num_inference_steps": 2},
    "batch_size": BATCH,
    "seed": 3,
    "keep": 25,
    "progress": False,
}
# Imports once and forks for each request, so that a process is there in an instant; prints each process's id and how it ended.
SERVER = """
import json, os, sys, tempfile, warnings
import torch
import flowkit
from flowkit.eval import evaluate
warnings.simplefilter("ignore")
torch.set_num_threads(1)
pipe = flowkit.load_demo("digits")
for line in sys.stdin:
    environments, arguments = json.loads(line)
    children = []
    for environment in environments:
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            tempfile.tempdir = None
            try:
                evaluate(pipe, **arguments | json.loads(environment.get("OWN", "{}")))
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(2)
            os._exit(0)
        children.append(pid)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
"""


class Server:
    def __init__(self) -> None:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=environment, **pipes)
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)

    def start(
        self,
        output: Path | None,
        world: int = 1,
        own: Mapping[int, Mapping[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
        **more: Any,
    ) -> list[int]:
        """Begins an evaluation in processes of their own; returns their ids."""
        environments: list[dict[str, str]] = [{}]
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "1",
            }
            environments = [
                {**shared, "RANK": str(r), "LOCAL_RANK": str(r), "OWN": json.dumps((own or {}).get(r, {}))}
                for r in range(world)
            ]
        assert self._process.stdin is not None
        print(
            json.dumps([environments, {**ARGUMENTS, **more, "output": output and str(output)}]),
            file=self._process.stdin,
            flush=True,
        )
        pids: list[int] = json.loads(self._line())
        return pids

    def wait(self) -> list[int]:
        """Returns how the processes ended."""
        codes: list[int] = json.loads(self._line())
        return codes

    def _line(self) -> str:
        assert self._process.stdout is not None
        return str(self._process.stdout.readline())

    def errors(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read() or ""

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flowkit.load_demo("digits")


@pytest.fixture(scope="module")
def whole(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    evaluate(pipe, output=folder, **ARGUMENTS)
    return folder


def bits(folder: Path) -> tuple[Any, ...]:
    """What must be equal: figures, errors, details and hashes of the samples, to the last bit."""
    result = Result.load(folder)
    return (
        dict(result),
        result.se,
        result.spec["features"],
        result.spec["samples"],
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))},
    )


def plain(result: Result) -> tuple[Any, ...]:
    return dict(result), result.se, result.spec["samples"]["sha256"]


# Processes, kills and resumptions.


@pytest.mark.parametrize("exact", [True, False])
def test_two_processes_equal_one(server: Server, pipe: Any, tmp_path: Path, exact: bool) -> None:
    one = tmp_path / "one"
    first = evaluate(pipe, output=one, exact=exact, **ARGUMENTS)
    server.start(tmp_path / "two", world=2, exact=exact)
    assert server.wait() == [0, 0], server.errors()
    assert bits(tmp_path / "two") == bits(one)
    spec = Result.load(tmp_path / "two").spec
    assert spec["processes"] == 2
    assert spec["network_evaluations"] == first.spec["network_evaluations"] == 2


def test_without_a_folder_processes_share_a_temporary_one(server: Server, tmp_path: Path) -> None:
    """And the main process alone removes it."""
    server.start(None, world=2, environment={"TMPDIR": str(tmp_path)})
    assert server.wait() == [0, 0], server.errors()
    assert list(tmp_path.glob("flowkit*")) == []


def killed_and_resumed(server: Server, out: Path, kills: int, worlds: list[int]) -> None:
    chance = random.Random(0)
    for number in range(kills):
        pids = server.start(out, world=worlds[number % len(worlds)])
        wanted = min(30, len(list(out.glob("samples/block-*"))) + chance.randrange(1, 5))
        deadline = time.monotonic() + 60
        while len(list(out.glob("samples/block-*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        codes = server.wait()
        assert -signal.SIGKILL in codes
        assert set(codes) <= {-signal.SIGKILL, 0}
    assert not (out / "result.json").exists()
    server.start(out, world=worlds[-1])
    assert set(server.wait()) == {0}, server.errors()


def test_killed_twice_and_resumed_on_another_number_of_processes(server: Server, whole: Path, tmp_path: Path) -> None:
    killed_and_resumed(server, tmp_path / "run", kills=2, worlds=[1, 2])
    assert bits(tmp_path / "run") == bits(whole)
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.slow
def test_killed_at_ten_moments(server: Server, whole: Path, tmp_path: Path) -> None:
    killed_and_resumed(server, tmp_path / "run", kills=10, worlds=[1, 2, 3])
    assert bits(tmp_path / "run") == bits(whole)


def test_a_finished_run_is_measured_again_without_drawing(pipe: Any, whole: Path, tmp_path: Path) -> None:
    """With other metrics and another extractor too; what is missing for them is computed from the same samples."""
    run = shutil.copytree(whole, tmp_path / "run")
    result = evaluate(pipe, output=run, **ARGUMENTS)
    assert bits(run) == bits(whole)
    assert result.spec["network_evaluations"] == 2
    assert torch.equal(result.images, torch.cat(list(sample_images(pipe, 25, seed=3, inputs=range(10), batch_size=10,
                                                                   call={"num_inference_steps": 2}))))  # fmt: skip
    more = evaluate(pipe, output=run, **{**ARGUMENTS, "metrics": ["fid", "recall", "fid/tiny"],
                                         "extractor": ["classifier", Named(1, 4)]})  # fmt: skip
    assert more["fid"] == result["fid"]
    assert set(more) == {"fid", "recall", "fid/tiny", "recall/tiny"}
    assert more.spec["samples"]["sha256"] == result.spec["samples"]["sha256"]


class Named(PixelExtractor):
    name = "tiny"


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"seed": 4}, "samples.seed 3, this one has 4"),
        ({"num_images": 340}, "samples.count 330, this one has 340"),
        ({"batch_size": 11}, "samples.batch_size 10, this one has 11"),
        ({"call": {"num_inference_steps": 3}}, "samples.call.num_inference_steps 2, this one has 3"),
        ({"inputs": [1]}, "samples.inputs_sha256"),
        ({"reference": "shapes"}, "extractors.classifier.dataset 'digits', this one has 'shapes'"),
        ({"resume": False}, "pass resume=True"),
    ],
)
def test_a_run_of_other_settings_is_refused(pipe: Any, whole: Path, changed: dict[str, Any], place: str) -> None:
    before = bits(whole)
    with pytest.raises(ValueError, match=place):
        evaluate(pipe, output=whole, **{**ARGUMENTS, **changed, "metrics": ["fid"]})
    assert bits(whole) == before


def test_another_model_of_the_same_class_is_refused(whole: Path) -> None:
    """Not the name decides: other weights under the same settings are another run."""
    other = flowkit.load_demo("digits")
    with torch.no_grad():
        next(iter(other.unet.parameters())).add_(1e-3)
    with pytest.raises(ValueError, match=r"samples.pipeline.weights_sha256"):
        evaluate(other, output=whole, **ARGUMENTS)


def test_what_is_attached_belongs_to_the_run(pipe: Any, whole: Path, tmp_path: Path) -> None:
    guided = {**ARGUMENTS, "call": {**ARGUMENTS["call"], "guidance_scale": 2.0}, "output": tmp_path / "guided"}
    with flowkit.attach(pipe, flowkit.AdaptiveGuidance(0.9)):
        found = evaluate(pipe, **guided)
        with pytest.raises(ValueError, match="samples"):
            evaluate(pipe, output=whole, **ARGUMENTS)
    (part,) = found.spec["pipeline"]["attached"]
    assert (part["class"], part["threshold"], part["space"]) == ("AdaptiveGuidance", 0.9, "x0")
    steps = found.spec["samples"]["call"]["num_inference_steps"]
    assert found.spec["network_evaluations"] < 2 * steps  # what was run, not what was asked for
    with (
        flowkit.attach(pipe, flowkit.AdaptiveGuidance(0.95)),
        pytest.raises(ValueError, match=r"attached\[0\].threshold 0.9"),
    ):
        evaluate(pipe, **guided)


def test_another_folder_and_a_broken_block_are_refused_by_name(pipe: Any, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no folder of an evaluation"):
        evaluate(pipe, output=tmp_path, **ARGUMENTS)
    run = shutil.copytree(whole, tmp_path / "run")
    broken = run / "samples" / "classifier" / "features-000003.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"features-000003.safetensors is corrupt"):
        evaluate(pipe, output=run, **ARGUMENTS)


def test_processes_with_other_arguments_are_refused(server: Server, tmp_path: Path) -> None:
    server.start(tmp_path / "run", world=2, own={1: {"seed": 7}})
    assert server.wait() == [2, 2]
    time.sleep(0.2)
    assert server.errors().count("process 1 has samples.seed 7, process 0 has 3") == 2
    assert not (tmp_path / "run").exists()


def test_a_failure_in_one_process_ends_all(server: Server, tmp_path: Path) -> None:
    server.start(tmp_path / "run", world=2, own={1: {"metrics": ["fvd"]}})
    assert server.wait() == [2, 2]
    time.sleep(0.2)
    errors = server.errors()
    assert "ValueError: unknown metric 'fvd'" in errors
    assert "PeerError: another process failed: unknown metric 'fvd'" in errors


def test_one_process_alone_agrees_with_itself() -> None:
    one = Processes.join(torch.device("cpu"))
    assert (one.main, one.count, one.gather(5), one.share("x"), one.agree(lambda: 3)) == (True, 1, [5], "x", 3)
    assert issubclass(PeerError, RuntimeError)


def test_exact_sums_do_not_see_how_features_are_grouped(drawn: Tensor) -> None:
    """Pixels are the same in any batch, so the figures are the same bits; and those of float64 to the rounding of the features."""
    shared: dict[str, Any] = {"reference": "digits", "extractor": "pixels", "progress": False}
    found = [evaluate(drawn, batch_size=size, exact=True, **shared) for size in (1, 10, 64)]
    assert found[0]["fid"] == found[1]["fid"] == found[2]["fid"]
    assert found[0].se == found[1].se == found[2].se
    assert found[0].spec["exact"] is True
    assert found[0]["fid"] == pytest.approx(evaluate(drawn, **shared)["fid"], rel=1e-6)


# Sources.


@pytest.fixture(scope="module")
def drawn(pipe: Any) -> Tensor:
    return torch.cat(
        list(sample_images(pipe, COUNT, seed=3, inputs=range(10), call={"num_inference_steps": 2}, batch_size=BATCH))
    )


def test_every_source_of_the_same_images_gives_the_same_bits(
    pipe: Any, drawn: Tensor, whole: Path, tmp_path: Path
) -> None:
    for index, image in enumerate(drawn):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{index:05d}.png")
    shared: dict[str, Any] = {
        "reference": "digits",
        "metrics": ARGUMENTS["metrics"],
        "batch_size": BATCH,
        "progress": False,
    }
    expected = plain(Result.load(whole))
    sources: dict[str, Any] = {
        "folder": images(tmp_path, channels=1),
        "tensor": drawn,
        "function": lambda index: drawn[index],
        "iterable": iter(drawn.split(7)),
        "data set": torch.utils.data.TensorDataset(drawn),
    }
    for name, source in sources.items():
        count = COUNT if name in ("function", "iterable") else None
        assert plain(evaluate(source, num_images=count, **shared)) == expected, name


def test_too_few_images_are_refused(drawn: Tensor, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"reference": "digits", "progress": False, "batch_size": 50}
    with pytest.raises(ValueError, match=r"331 images are asked for, and there are 330 in tensor"):
        evaluate(drawn, num_images=331, **shared)
    with pytest.raises(ValueError, match=r"the images ended after 330, 400 were promised"):
        evaluate(iter(drawn.split(100)), num_images=400, output=tmp_path / "run", **shared)
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(ValueError, match=r"not known before they are read; pass num_images="):
        evaluate(iter(drawn.split(100)), **shared)
    with pytest.raises(ValueError, match="num_images=1 "):
        evaluate(drawn[:1], **shared)
    with pytest.raises(TypeError, match="inputs and call are arguments of a pipeline"):
        evaluate(drawn, inputs=[1], **shared)
    with pytest.raises(ValueError, match="seed=1 is of a pipeline's noise"):
        evaluate(drawn, seed=1, **shared)


def test_other_images_in_the_same_place_are_not_taken_for_the_old_ones(drawn: Tensor, tmp_path: Path) -> None:
    """torch-fidelity returns the old score where new images come under an old name."""
    shared: dict[str, Any] = {"reference": "digits", "progress": False, "output": tmp_path / "run"}
    evaluate(drawn, **shared)
    with pytest.raises(ValueError, match=r"samples\.probe_sha256"):
        evaluate(255 - drawn, **shared)


def test_references_may_be_images(drawn: Tensor) -> None:
    held_out = assets.images("digits", "held-out")[0]
    shared: dict[str, Any] = {"metrics": ["fid", "kid", "coverage"], "extractor": PixelExtractor(1), "progress": False}
    from_images = evaluate(drawn, held_out, **shared)
    embedded = evaluate(drawn, "digits", **shared)
    assert from_images["fid"] == pytest.approx(embedded["fid"], rel=1e-9)
    assert (from_images["kid"], from_images["coverage"]) == (embedded["kid"], embedded["coverage"])
    assert from_images.spec["features"]["kid"]["reference"]["images"] == 500
    assert evaluate(held_out, held_out, **shared)["fid"] < 1e-9


def test_metrics_that_cannot_be_served_are_refused_before_anything_is_drawn(drawn: Tensor, tmp_path: Path) -> None:
    from flowkit.eval import FeatureStats

    stats = FeatureStats.empty(64, PixelExtractor(1).identity)
    stats.update(torch.randn(100, 64))
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"reference": stats, "metrics": ["fid", "kid"]},
            "'kid' is measured against images, and in memory holds statistics",
        ),
        (
            {"reference": None, "metrics": ["fid"], "extractor": PixelExtractor(1)},
            "'fid' is measured against images, and there is no",
        ),
        ({"reference": "digits", "metrics": ["is"]}, "needs logits, which 'classifier' does not have"),
        ({"reference": "digits", "metrics": ["kid_subsets"]}, "'kid_subsets' takes at least 1,000 images, got 330"),
        (
            {"reference": "digits", "metrics": ["fid_infinity/pixels"], "num_images": 100},
            "takes at least 143 images, got 100",
        ),
        ({"reference": ["digits"], "metrics": ["fid", "fid/pixels"]}, "'pixels' of a metric has no reference"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(drawn, output=tmp_path / "run", progress=False, **kwargs)
    assert not (tmp_path / "run").exists()


# Results.


def test_a_result_comes_back_from_its_file_and_repeats(pipe: Any, whole: Path, tmp_path: Path) -> None:
    result = Result.load(whole)
    content = json.loads((whole / "result.json").read_text())
    assert content["figures"]["precision"]["value"] == result["precision"]
    assert (content["figures"]["kid"]["se"], set(result)) == (
        result.se["kid"],
        {"fid", "kid", "precision", "fid/pixels"},
    )
    spec = content["spec"]
    assert set(spec) == {"samples", "pipeline", "metrics", "features", "exact", "network_evaluations", "seconds", "wall_seconds",
                         "processes", "versions"}  # fmt: skip
    again = evaluate(
        pipe,
        spec["features"]["fid"]["reference"]["origin"].removeprefix("embedded "),
        spec["samples"]["count"],
        metrics=spec["metrics"],
        inputs=list(range(10)),
        **{k: spec["samples"][k] for k in ("seed", "call", "batch_size")},
        exact=spec["exact"],
        progress=False,
    )
    assert plain(again) == plain(result)
    assert again.spec["samples"] == spec["samples"]
    again.save(tmp_path / "copy.json")
    assert plain(Result.load(tmp_path / "copy.json")) == plain(result)
    with pytest.raises(FileNotFoundError, match="no result at"):
        Result.load(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of an evaluation"):
        Result.load(tmp_path)


def test_paired_differences_are_tighter_than_their_figures(pipe: Any, whole: Path) -> None:
    other = evaluate(pipe, **{**ARGUMENTS, "call": {"num_inference_steps": 3}, "metrics": ["fid", "fid/pixels"]})
    found = compare(whole, other)
    assert set(found) == {"fid", "fid/pixels"}
    difference = found["fid"]
    assert difference.value == Result.load(whole)["fid"] - other["fid"]
    low, high = difference.details["interval"]
    assert low < difference.value < high
    assert difference.se < other.se["fid"]
    assert compare(other, other)["fid"].value == 0
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 4}, "their seed is 3 and 4"),
        ({"num_images": 320}, "their count is 330 and 320"),
        ({"metrics": ["kid"]}, "no figure of both has a jackknife"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            compare(whole, evaluate(pipe, **{**ARGUMENTS, "metrics": ["fid"], **kwargs}))
    changed = evaluate(pipe, **{**ARGUMENTS, "extractor": PixelExtractor(1), "metrics": ["fid"]})
    with pytest.raises(ValueError, match=r"'fid' was measured with extractor"):
        compare(whole, changed)


def test_seed_blocks_give_a_mean_and_a_spread(pipe: Any, whole: Path) -> None:
    runs = [evaluate(pipe, **{**ARGUMENTS, "seed": seed, "metrics": ["fid", "kid"]}) for seed in (1, 2)]
    found = summarize([whole, *runs])
    values = [Result.load(whole)["fid"], *(r["fid"] for r in runs)]
    assert found["fid"].value == pytest.approx(sum(values) / 3)
    assert found["fid"].details["values"] == values
    assert set(found) == {"fid", "kid"}
    with pytest.raises(ValueError, match="must have different seeds"):
        summarize([whole, whole])
    with pytest.raises(ValueError, match="at least 2 evaluations, got 1"):
        summarize([whole])
    other = evaluate(pipe, **{**ARGUMENTS, "seed": 1, "call": {"num_inference_steps": 1}})
    with pytest.raises(ValueError, match=r"differ in samples.call.num_inference_steps"):
        summarize([whole, other])


def test_blocks_are_whole_batches_and_cover_everything(tmp_path: Path) -> None:
    for count, batch in [(1, 64), (50_000, 64), (2000, 250), (777, 5), (50_000, 1)]:
        blocks = Spools(tmp_path, count, batch, {}).blocks
        assert [i for block in blocks for i in (block.start, block.stop)][1:-1:2] == [b.start for b in blocks[1:]]
        assert (blocks[0].start, blocks[-1].stop) == (0, count)
        assert all(len(block) % batch == 0 and len(block) <= 8 * batch for block in blocks[:-1])
    assert len(Spools(tmp_path, 50_000, 64, {}).blocks) == 98


def test_a_full_disk_is_told_before_anything_is_drawn(
    drawn: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"the features take 0.0 GB, and .* has 0.0 GB left"):
        evaluate(drawn, "digits", progress=False, output=tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()


def test_the_time_is_told_after_the_first_batch(
    drawn: Tensor, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowkit.eval.job.NOTABLE", 0)
    evaluate(drawn, "digits", batch_size=10)
    assert "sampling: the first 10 images took" in capfd.readouterr().err
