"""The command line: what users see when they ask for help, mistype, or interrupt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import flowkit
from flowkit.cli import app

Demo = Callable[[Callable[..., None]], None]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Demo:
    """Puts a function in the place of flowkit.cli.demo.run."""

    def install(run: Callable[..., None]) -> None:
        module = ModuleType("flowkit.cli.demo")
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, "flowkit.cli.demo", module)

    return install


def _raises(error: BaseException) -> Callable[..., None]:
    def run(**_: object) -> None:
        raise error

    return run


def test_options_reach_the_command(demo: Demo) -> None:
    calls: list[dict[str, object]] = []
    demo(lambda **options: calls.append(options))
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    given = ["demo", "--data", "shapes", "--output", "here", "--fast", "--samples", "50", "--seed", "7"]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert calls == [
        {"data": "digits", "output": Path("flowkit-demo"), "fast": False, "samples": 2000, "seed": 0},
        {"data": "shapes", "output": Path("here"), "fast": True, "samples": 50, "seed": 7},
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("samples is 0: give at least 10"), "error: samples is 0: give at least 10"),
        (TypeError("steps must be an int, not str"), "error: steps must be an int, not str"),
        (FileNotFoundError("no file weights.safetensors:\n  run the demo first"),
         "error: no file weights.safetensors: run the demo first"),
        (PermissionError(13, "Permission denied", "out"), "error: [Errno 13] Permission denied: 'out'"),
        (ImportError("reports need jinja2"), "error: reports need jinja2"),
        (FloatingPointError("NaN after step 3"), "error: NaN after step 3"),
        (ValueError(), "error: ValueError"),
    ],
)  # fmt: skip
def test_a_users_error_is_one_line_and_exit_code_2(demo: Demo, error: Exception, line: str) -> None:
    demo(_raises(error))
    result = CliRunner().invoke(app, ["demo"])
    assert (result.exit_code, result.stderr, result.stdout) == (2, f"{line}\n", "")


def test_traceback_on_request(demo: Demo) -> None:
    demo(_raises(ValueError("samples is 0")))
    result = CliRunner().invoke(app, ["--traceback", "demo"])
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: samples is 0\n")


def test_our_own_mistakes_are_not_dressed_as_the_users(demo: Demo) -> None:
    demo(_raises(RuntimeError("a bug")))
    result = CliRunner().invoke(app, ["demo"])
    assert isinstance(result.exception, RuntimeError)


def test_interrupt_is_one_line_and_exit_code_130(demo: Demo) -> None:
    demo(_raises(KeyboardInterrupt()))
    result = CliRunner().invoke(app, ["demo"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["demo", "--data", "faces"], "faces"),
        (["demo", "--samples", "many"], "--samples"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "extra"], "extra"),
        (["sample", "digits"], "--output"),
        (["sample", "--output", "here"], "model"),
        (["sample", "digits", "--output", "here", "--count", "many"], "--count"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_wrong_option_is_named(demo: Demo, arguments: list[str], word: str) -> None:
    demo(_raises(AssertionError("the command ran")))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"flowkit {flowkit.__version__}\n")


def test_every_option_says_what_it_does_and_its_default() -> None:
    text = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).stdout
    for option in ("--data", "--output", "--samples", "--seed"):
        assert "[default:" in next(line for line in text.splitlines() if option in line)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["sample", "--help"],
        ["report", "--help"],
        ["--version"],
        ["demo", "--data", "faces"],
    ],
)
def test_answers_without_importing_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from flowkit.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    print('LOADED', sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "LOADED []"
