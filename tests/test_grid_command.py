"""``flowkit grid``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flowkit import paths, solvers, table
from flowkit.cli import app
from flowkit.grids import GRIDS, Grid, named

DIGITS = Path(__file__).parents[1] / "flowkit" / "assets" / "digits"
VP = paths.vp(paths.betas())


def out(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["grid", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def data(*arguments: object) -> Any:
    return json.loads(out(*arguments, "--json"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def error(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["grid", *map(str, arguments)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Grid((1.0, 0.6, 0.2, 0.0), solver="euler", about={"method": "bellman", "cost": 0.123456789}).save(
        tmp_path / "g.json"
    )
    return tmp_path / "g.json"


def test_grids_are_compared_side_by_side(file: Path) -> None:
    lines = out(file, "uniform", "1.0,0.5,0.25,0").splitlines()
    assert lines[0].split() == ["g.json", "(flow)", "uniform", "(flow)", "list", "(flow)"]
    assert lines[1].split() == ["step", *["sigma", "time", "log-SNR"] * 3]
    assert lines[3].split() == ["1", "0.6", "600", "-0.4055", "0.66667", "666.67", "-0.6931", "0.5", "500", "0"]
    assert lines[5].split() == ["3", *["0", "inf"] * 3]
    assert "g.json: 3 steps on the path flow, made for solver euler" in lines
    assert "  method bellman, cost 0.12346" in lines


@pytest.mark.parametrize("path", ["flow", "vp", "cosine", "ve", "edm"])
def test_every_page_fits_into_80_columns(path: str, file: Path) -> None:
    timed = ("uniform", "trailing", "leading", "linspace", "straight")
    names = [n for n in GRIDS if n not in timed or path in ("flow", "vp", "cosine")]
    names = [n for n in names if (n, path) != ("ays-svd", "vp")]
    text = out(file, *names, "--steps", 7, "--path", path, "--show")
    assert max(map(len, text.splitlines())) <= 80
    for name in names:
        assert f"{name}: 7 steps on the path {path}" in text


def test_names_live_where_their_models_do() -> None:
    assert [g["grid"]["path"] for g in data("karras", "ays-sd15", "ays-svd", "--steps", 3)["grids"]] == [
        "flow",
        "vp",
        "edm",
    ]
    (moved,) = data("ays-sd15", "--path", "flow")["grids"]
    assert moved["grid"]["sigmas"] == list(Grid.ays("sd15").on("flow").sigmas)


def test_steps(file: Path) -> None:
    lengths = [len(g["levels"]) - 1 for g in data("uniform", file, "ays-sdxl")["grids"]]
    assert lengths == [3, 3, 3]  # the file says how many
    assert len(data("uniform")["grids"][0]["levels"]) == 11
    (fine,) = data(file, "--steps", 5)["grids"]
    assert fine["grid"]["sigmas"] == list(Grid.load(file).resampled(5).sigmas)
    (same,) = data(file, "--steps", 3)["grids"]
    assert same["grid"] == Grid.load(file).to_dict()


def test_changes_apply_in_their_order(tmp_path: Path) -> None:
    given = ("karras", "--steps", 4, "--shift", 2, "--terminal", 0.1, "--whole-times", "--save", tmp_path / "a.json")
    assert out(*given).endswith(f"written: {tmp_path / 'a.json'}\n")
    expected = named("karras", 4, paths.flow()).with_shift(2.0).stretched(0.1).at_whole_times(paths.flow())
    assert Grid.load(tmp_path / "a.json") == expected
    (pushed,) = data("uniform", "--mu", 1.15)["grids"]
    assert pushed["grid"]["sigmas"] == list(Grid.uniform(10).with_shift(mu=1.15).sigmas)


def test_the_path_of_a_model(tmp_path: Path) -> None:
    diffusers.DDIMScheduler(beta_start=0.001, beta_end=0.01).save_pretrained(tmp_path)
    stock = diffusers.DDIMScheduler(beta_start=0.001, beta_end=0.01)
    (grid,) = data("leading", "--steps", 4, "--model", tmp_path)["grids"]
    bar = stock.alphas_cumprod[[750, 500, 250, 0]].double()
    assert grid["grid"]["sigmas"] == pytest.approx([*((1 - bar) / bar).sqrt().tolist(), 0.0], rel=1e-4)
    assert [row["time"] for row in grid["levels"]] == pytest.approx([750, 500, 250, 0, None])
    assert data("uniform", "--model", DIGITS)["grids"][0]["grid"]["path"] == "flow"


def test_solvers_show_their_facts_and_tables(file: Path) -> None:
    text = out(file, "--show")
    for name, solver in solvers.SOLVERS.items():
        assert f"{name} on g.json: {solver.facts}" in " ".join(text.split())
    lines = out("uniform", "--steps", 2, "--solver", "heun").splitlines()
    start = lines.index("step call    sigma     time   result        a       b0       b1")
    rows = [list(map(float, line.split())) for line in lines[start + 1 : start + 4]]
    assert rows == [
        [0, 0, 1, 1000, 0.5, 1, -0.5],
        [0, 1, 0.5, 500, 0.5, 1, -0.25, 0.25],
        [1, 2, 0.5, 500, 0, 1, -0.5],
    ]


def test_a_solver_that_cannot_start_is_told_and_asked_for_refused() -> None:
    (run, *_) = data("1.0,0.5,0.0", "--show")["runs"]
    assert "error" not in run
    runs = data("inf,1,0", "--path", "ve", "--show")["runs"]
    assert all("cannot start at infinite sigma" in run["error"] for run in runs)
    assert "cannot start at infinite sigma" in error("inf,1,0", "--path", "ve", "--solver", "euler")


CALLS = [
    (("karras", "--steps", 5, "--path", "flow"), "FlowMatchEulerDiscreteScheduler", {}),
    (("uniform", "--steps", 30), "UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    (("ays-sd15", "--whole-times"), "DPMSolverMultistepScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085,
                                                                  "beta_end": 0.012}),
    (("exponential", "--path", "edm"), "EDMEulerScheduler", {}),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "config"), CALLS)
def test_the_printed_call_runs(source: tuple[Any, ...], name: str, config: dict[str, Any]) -> None:
    text = out(*source, "--for-stock", name)
    scheduler = getattr(diffusers, name)(**config)
    exec(text, {"np": np, "torch": torch, "scheduler": scheduler})
    (grid,) = data(*source)["grids"]
    assert scheduler.sigmas.tolist() == pytest.approx(grid["grid"]["sigmas"], rel=1e-4)
    assert max(map(len, text.splitlines())) <= 80


def test_a_call_for_a_saved_scheduler(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    text = out("1,0.5,0.1,0", "--for-stock", tmp_path, "--stock-mu", 1.15)
    exec(text, {"scheduler": scheduler})
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.5, 0.1, 0])
    (stock,) = data("1,0.5,0.1,0", "--for-stock", tmp_path, "--stock-mu", 1.15)["stock"]
    assert stock["sigmas"] == Grid((1, 0.5, 0.1, 0)).for_stock(scheduler, 1.15)["sigmas"]
    assert "needs a number mu, got None" in error("uniform", "--for-stock", tmp_path)
    # another class for the same model
    diffusers.DDIMScheduler(beta_start=0.001, beta_end=0.01).save_pretrained(tmp_path / "vp")
    euler = diffusers.EulerDiscreteScheduler(beta_start=0.001, beta_end=0.01)
    text = out("karras", "--model", tmp_path / "vp", "--for-stock", "EulerDiscreteScheduler")
    exec(text, {"scheduler": euler})
    assert "# karras for EulerDiscreteScheduler.from_config(pipe.scheduler.config)" in text
    assert euler.timesteps[0] == pytest.approx(999)
    text = out("uniform", "--model", DIGITS, "--for-stock", "UniPCMultistepScheduler")
    made = "UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True, prediction_type='flow_prediction')"
    assert made in text.replace("\n#  ", "")


def test_numbers_for_comfyui() -> None:
    assert out("0.75,2e-5,0", "--comfyui") == "0.75, 0.00002, 0.0\n"
    assert Grid.parse(out("ays-sdxl", "--comfyui"), "vp") == Grid.ays("sdxl")
    assert data("1,0", "--comfyui")["comfyui"] == ["1.0, 0.0"]
    assert "starts at an infinite level" in error("uniform", "--path", "cosine", "--comfyui")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_picture(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    Grid.uniform(4).save(tmp_path / "a$b$_.json")
    picture = tmp_path / f"levels.{ending}"
    out(tmp_path / "a$b$_.json", "ays-svd", "uniform", "--plot", picture)
    assert picture.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    if ending == "svg":
        assert "a$b$_.json (flow)" in picture.read_text()


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "flowkit-diffusion[report]"' in error("uniform", "--plot", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nosuch.json"],
            "no grid 'nosuch.json': no such file, no list as 1.0,0.5,0.0, and not one of the names uniform",
        ),
        (["1.0,0.5,0.5"], "must strictly fall"),
        (["1.0,--,0"], "not a list of levels"),
        (["14.6,1,0"], "sigma/alpha above 1 belongs to the paths vp"),
        (["uniform", "--path", "edm"], "use Grid.karras"),
        (["uniform", "--path", "vp", "--model", "x"], "both --path vp and --model x"),
        (["uniform", "--model", "nosuch"], "no scheduler_config.json in nosuch"),
        (["uniform", "--steps", "0"], "--steps"),
        (["uniform", "--solver", "rk5"], "unknown solver 'rk5'; choose one of euler"),
        (["uniform", "--for-stock", "Foo"], "'Foo' is no scheduler class of diffusers"),
        (["uniform", "--for-stock", "ModelMixin"], "'ModelMixin' is no scheduler class of diffusers"),
        (["uniform", "--for-stock", "DDIMScheduler"], "takes neither sigmas nor timesteps"),
        (["uniform", "--stock-mu", "1"], "--stock-mu 1 is for the scheduler of --for-stock"),
        (["uniform", "karras", "--save", "x.json"], "--save writes one grid, got 2 sources"),
        (["uniform", "--plot", "x.txt"], "cannot draw 'x.txt'; end the name in .png"),
        (["uniform", "--shift", "2", "--mu", "1"], "either a shift or mu"),
        (["uniform", "--path", "vp", "--shift", "2"], "only flow grids can be shifted"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["grid", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\x00\xff\xfe", b"[" * 100_000, b'{"format": "flowkit.grid/1", "path": "flow", "sigmas": [NaN, 0]}', b"[1, 0]",
     b'{"format": "flowkit.grid/1", "path": "flow", "sigmas": "1, 0"}', b" " * (1 << 25)],
)  # fmt: skip
def test_hostile_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "hostile.json"
    file.write_bytes(content)
    line = error(file)
    assert "hostile.json" in line
    assert len(line) < 1000
    (tmp_path / "scheduler_config.json").write_bytes(content)
    assert "scheduler_config.json" in error("uniform", "--model", tmp_path)


def test_a_files_words_cannot_steer_the_terminal(tmp_path: Path) -> None:
    Grid((1.0, 0.0), solver="a\x1b[2Jb", about={"k\x1b[31m": "v\x07\n" + "x" * 100_000}).save(tmp_path / "g.json")
    text = out(tmp_path / "g.json")
    assert "made for solver a [2Jb" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text) < 1000


def test_wide_tables_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    row = table.Row(0.5, 0.25, 500.0, 0, 1.0, 0.0, -1.23456e-7, (-0.0123456, 1234567.8, 1 / 3, -1e-9), 0.123456, 3)
    for wide in (1, 2, 3, 4, 5):
        monkeypatch.setattr(table, "build", lambda *_, n=wide, **__: [row._replace(b=(row.b * 2)[:n])])
        lines = out("0.5,0.25", "--solver", "euler").splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("step call"))
        assert len(lines[start].split()) == len(lines[start + 1].split()) == 7 + wide
        assert len(lines[start + 1]) <= 80


@pytest.mark.parametrize("arguments", [["grid", "--help"], ["grid", "uniform", "--steps", "0"], ["grid"]])
def test_help_and_wrong_options_answer_without_importing_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom flowkit.cli import main\ntry:\n    main()\nexcept SystemExit:\n"
        "    print('LOADED', sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "LOADED []"


def test_the_help_names_every_grid() -> None:
    text = " ".join(CliRunner().invoke(app, ["grid", "--help"], env={"COLUMNS": "200"}).stdout.split())
    for name in GRIDS:
        assert name in text


def test_facts_need_no_grid() -> None:
    result = CliRunner().invoke(app, ["grid", "--show"])
    assert result.exit_code == 0
    lines = " ".join(result.stdout.split())
    for name, solver in solvers.SOLVERS.items():
        assert f"{name} {solver.facts}" in lines
    assert max(map(len, result.stdout.splitlines())) <= 80
    one = CliRunner().invoke(app, ["grid", "--solver", "heun", "--json"]).stdout
    assert json.loads(one) == {"heun": solvers.find("heun").facts}
    none = CliRunner().invoke(app, ["grid"])
    assert (none.exit_code, none.stderr) == (
        2, "error: no grid named; name one such as uniform, a file or a list, or add --show for the solvers\n"
    )  # fmt: skip
