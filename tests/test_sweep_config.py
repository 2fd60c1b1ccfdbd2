"""Sweep files: what is refused, with its line; cells, their keys and names; and that nothing depends on how YAML is written."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import flowkit
from flowkit import Grid, weights
from flowkit.eval.sweep import cells
from flowkit.eval.sweep.axes import Range
from flowkit.eval.sweep.config import SweepConfig, read
from flowkit.pipelines import swap

BASE = """model: digits
reference: digits
images: 100
labels: 0-9
"""
AXES = "axes:\n  steps: [4, 8]\n"


def write(folder: Path, text: str, name: str = "sweep.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def sweep(**changes: Any) -> dict[str, Any]:
    """A sweep in Python; None takes a field away."""
    fields = {"model": "digits", "reference": "digits", "images": 100, "labels": "0-9", "axes": {"steps": [4, 8]}}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def refusal(source: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(source)
    return str(caught.value)


def linear(steps: int = 4) -> flowkit.LinearAdaptiveGuidance:
    coefficients = torch.zeros(1, 2, steps, dtype=torch.float64)
    coefficients[0, 0, 1] = 1.0
    return flowkit.LinearAdaptiveGuidance(coefficients, [1])


# A line added to BASE + AXES (so that it is line 7), and what is said of it.
FIELDS = [
    ("imagse: 3", "imagse is no field; did you mean images?"),
    ("call.height: 3", "call.height is no field; write call: {height: VALUE}"),
    ("batch_size: many", 'batch_size is "many", not a whole number of at least 1'),
    ("batch_size: 0", "batch_size is 0, not a whole number of at least 1"),
    ("batch_size: 8.0", "batch_size is 8.0, not a whole number of at least 1"),
    ('batch_size: "8"', 'batch_size is "8", not a whole number of at least 1'),
    ("batch_size: 010", 'batch_size is "010", not a whole number of at least 1'),
    ("batch_size: 1:30", 'batch_size is "1:30", not a whole number of at least 1'),
    ("keep: yes", "keep is true (YAML takes the word yes for a truth value; put it in quotes), not a whole number"),
    ("keep: true", "keep is true, not a whole number of at least 0"),
    ("keep: -1", "keep is -1, not a whole number of at least 0"),
    ("seed: 0.5", "seed is 0.5, not a whole number"),
    ("exact: 1", "exact is 1, not true or false"),
    ("retries: -1", "retries is -1, not a whole number of at least 0"),
    ("name: 3", "name is 3, not text of at most 100 characters"),
    ("name: ..", 'name is "..", which cannot name a folder; use letters, digits, spaces and .-_'),
    ("name: 'a:b'", 'name is "a:b", which cannot name a folder'),
    ("name: 'a/b'", 'name is "a/b", which cannot name a folder'),
    ("lora: off", "lora is false (YAML takes the word off for a truth value; put it in quotes), not a file"),
    ("solver: eulr", "solver cannot be used: unknown solver 'eulr'; choose one of euler"),
    ("solver: ''", 'solver is "", not the name of a solver'),
    ("scheduler: DDMScheduler", "scheduler cannot be used: unknown scheduler 'DDMScheduler'; choose flowkit, keep"),
    ("grid: uniforn", "grid cannot be used: unknown grid 'uniforn'; choose uniform"),
    ("grid: four.json", "grid cannot be used: no grid file at"),
    ("lora: adapters/none.safetensors", "lora cannot be used: there is no LoRA 'adapters/none.safetensors'"),
    ("lora: sweep.yaml", "lora cannot be used: "),
    ("lora: .", "lora cannot be used: . holds no .safetensors; give a LoRA's folder or file"),
    ("seed: 18446744073709551616", "seed is a number of 20 digits; give a smaller one"),
    ("guidance_scale: high", 'guidance_scale is "high", not a number'),
    ("guidance_scale: .inf", "guidance_scale is inf; give a finite number"),
    ("guidance_scale: .nan", "guidance_scale is nan; give a finite number"),
    ("guidance_scale: 1e999", "guidance_scale is inf; give a finite number"),
    ("guidance: AdaptiveGuidance", 'guidance is "AdaptiveGuidance", not none, or a method with its arguments'),
    ("guidance: {threshold: 2}", "guidance names no method; write {method: AdaptiveGuidance, threshold: 0.991}"),
    ("guidance: {method: Adaptive}", "guidance cannot be built: unknown method 'Adaptive'; choose AdaptiveGuidance"),
    ("guidance: {method: AdaptiveGuidance, treshold: 2}", "guidance cannot be built: AdaptiveGuidance has no 'treshold'; it takes"),
    ("guidance: {method: AdaptiveGuidance, threshold: high}", "guidance cannot be built: threshold must be one number"),
    ("guidance: {method: AdaptiveGuidance, per_sample: 'no'}", "per_sample of AdaptiveGuidance is 'no'; give true or false"),
    ("guidance: {method: IntervalGuidance, low: 0}", "guidance cannot be built: IntervalGuidance lacks 'high'; give it"),
    ("guidance: {method: ProjectedGuidance}", "ProjectedGuidance lacks 'scale'; give it, or guidance_scale"),
    ("guidance: {method: PolicyGuidance}", "guidance cannot be built: PolicyGuidance lacks 'options'; give it, or a file"),
    ("guidance: {method: PolicyGuidance, file: p.json}", "guidance cannot be built: no policy at"),
    ("guidance: {method: PolicyGuidance, file: p.json, about: {}}", "has its arguments from the file; leave out about"),
    ("guidance: {method: ZeroStarGuidance, file: p.json}", "guidance cannot be built: ZeroStarGuidance is not read from files"),
    ("knobs: [1]", "knobs is [1], not a mapping of the scheduler's knobs"),
    ("knobs: {solver: euler}", "knobs.solver cannot be given here; write solver"),
    ("knobs: {shfit: 3}", "knobs.shfit is no knob of a scheduler; did you mean shift?"),
    ("knobs: {eta: .nan}", "knobs.eta is nan; give a finite number"),
    ("call: {guidance_scale: 2}", "call.guidance_scale cannot be given here; write guidance_scale"),
    ("call: {num_inference_steps: 2}", "call.num_inference_steps cannot be given here; write steps"),
    ("call: {generator: 2}", "call.generator cannot be given here; it comes from seed and batch_size"),
    ("call: {output_type: pil}", "call.output_type cannot be given here; the measurement sets it"),
    ("metrics: []", "metrics is [], not a list of metrics such as [fid]"),
    ("metrics: [fid, fid]", "metrics holds a value twice; keep one"),
    ("metrics: [fid, 3]", "metrics[1] is 3, not a list of metrics"),
    ("metrics: [fid, kdi]", 'metrics[1] is "kdi", which is no metric; did you mean kid?'),
    ("objectives: [kid]", 'objectives[0] is "kid", which is not measured; choose fid, evaluations, seconds'),
    ("objectives: []", "objectives is [], not a list of the metrics' keys, evaluations and seconds"),
    ("extractor: [a, a]", 'extractor is ["a", "a"], not the name of an extractor, or a list of different ones'),
    ("prompts: [a cat]", "prompts say what to draw, and so do the labels; keep one"),
    ("dtype: float8", 'dtype is "float8", not auto, float32, bfloat16 or float16'),
    ("device: gpu", 'device is "gpu", which torch does not know; choose auto, cpu or cuda'),
    ("storage: study.db", "storage is no URL; write one such as postgresql://user@host/db"),
    ("trackers: [tensorbord]", 'trackers[0] is "tensorbord", which accelerate does not have; did you mean tensorboard?'),
    ("search: tpe", 'search is "tpe", not a mapping such as {sampler: tpe, trials: 100}'),
    ("search: {sampler: tp}", 'search.sampler is "tp", not grid, tpe, nsga2 or random'),
    ("search: {sampler: tpe}", "search lacks trials, which the sampler tpe needs; write {sampler: tpe, trials: 100}"),
    ("search: {sampler: tpe, trials: 0}", "search.trials is 0, not a whole number from 1 to 100000"),
    ("search: {sampler: tpe, trails: 9}", "search.trails is no field; did you mean trials?"),
    ("search: {trials: 9}", "search.trials is 9, and the sampler grid takes all cells; leave it out, or name a sampler"),
    ("seed: !!python/object/apply:os.system [ls]", "seed has the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("seed: !mine 3", "seed has the tag '!mine', and tags are not read; leave it out"),
    ("\tseed: 3", "there is a tab; indent with spaces"),
    ("---\nmodel: shapes", "a second document begins here; keep one sweep a file"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), FIELDS)
def test_a_wrong_field_is_told_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    told = refusal(write(tmp_path, BASE + AXES + line + "\n"))
    assert told.startswith("sweep.yaml, line 7: ")
    assert message in told
    assert "\n" not in told  # and nothing else is wrong


# Axes below BASE and "axes:" in line 5; the line, and what is said.
AXES_FAULTS = [
    ("  solvr: [euler]", 6, "axes.solvr is no setting; did you mean solver?"),
    ("  zzz: [red]", 6, "axes.zzz is no setting; choose model, lora"),
    ("  call.: [3]", 6, "axes.call. is no setting"),
    ("  steps: []", 6, "axes.steps is an empty list; give a value, or leave it out"),
    ("  steps: 4", 6, "axes.steps is 4, not a list; write [4], or move it to the top"),
    ("  steps:\n  - 4\n  - '8'", 8, 'axes.steps[1] is "8", not a whole number of at least 1'),
    ("  steps: [4, 1e1]", 6, "axes.steps[1] is 10.0, not a whole number of at least 1"),
    ("  steps: [4, 0]", 6, "axes.steps[1] is 0, not a whole number of at least 1"),
    ("  steps: [4, true]", 6, "axes.steps[1] is true, not a whole number of at least 1"),
    ("  steps: [null, 4]", 6, "axes.steps[0] is null, not a whole number of at least 1"),
    ("  solver: [on]", 6, "axes.solver[0] is true, not the name of a solver"),
    ("  solver: [euler, eulr]", 6, "axes.solver[1] cannot be used: unknown solver 'eulr'"),
    ("  steps: [4,\n    8,\n    4]", 8, "axes.steps[2] is 4, which stands before it; keep one"),
    ("  guidance_scale: [1, 1.0]", 6, "axes.guidance_scale[1] is 1.0, which stands before it; keep one"),
    ("  guidance: [none, null]", 6, "axes.guidance[1] is null, which stands before it; keep one"),
    ("  guidance: [{method: ZeroStarGuidance, scale: 3, zero_init: 1},\n    {zero_init: 1, method: ZeroStarGuidance, scale: 3}]",
     7, "axes.guidance[1] is {"),
    ("  guidance:\n  - none\n  - {method: IntervalGuidance, low: 2, high: 1}", 8, "axes.guidance[1] cannot be built: the interval"),
    ("  guidance: [{threshold: 2}]", 6, "axes.guidance[0] names no method"),
    ("  knobs.eta: [1, 1.0]", 6, "axes.knobs.eta[1] is 1.0, which stands before it"),
    ("  knobs.etaa: [1, 2]", 6, "axes.knobs.etaa is no knob of a scheduler; did you mean eta?"),
    ("  knobs.grid: [uniform]", 6, "axes.knobs.grid cannot be given here; write grid"),
    ("  call.guidance_scale: [1]", 6, "axes.call.guidance_scale cannot be given here; write guidance_scale"),
    ("  call.negative_prompt: [ugly]", 6, "axes.call.negative_prompt is an argument of each sample, not of a cell"),
    ("  lora: [none, a.bin]", 6, "axes.lora[1] cannot be used: there is no LoRA 'a.bin'"),
    ("  grid: [none, a/b.json]", 6, "axes.grid[1] cannot be used: no grid file at"),
    ("  steps: {low: 2, high: 8}", 6, "axes.steps is a range, and the sampler grid takes lists"),
    ("  steps: {low: 2, high: 4, hihg: 8}", 6, "axes.steps.hihg is no part of a range"),
    ("  steps: {low: 8, high: 2}", 6, "axes.steps runs from 8 to 2; give low below high"),
    ("  steps: {low: 0, high: 2}", 6, "axes.steps runs from 0 to 2; give whole numbers of at least 1"),
    ("  steps: {low: 1, high: 2.5}", 6, "axes.steps runs from 1 to 2.5; give whole numbers of at least 1"),
    ("  steps:\n    low: 2\n    high: many", 8, 'axes.steps.high is "many", not a number'),
    ("  steps: {low: 2}", 6, "axes.steps is a range without high; write {low: 2, high: 32}, or a list of values"),
    ("  guidance_scale: {low: 0, high: 2, log: true}", 6, "axes.guidance_scale is logarithmic from 0; start above 0"),
    ("  guidance_scale: {low: 1, high: 2, step: 0}", 6, "axes.guidance_scale has the step 0; give a number above 0"),
    ("  solver: {low: 1, high: 2}", 6, "axes.solver is a mapping, not a list; only steps, guidance_scale, knobs.NAME"),
    ("  {}", 5, "axes is {}, not a mapping from settings to lists; write {steps: [4, 8]}"),
    ("  []", 5, "axes is [], not a mapping from settings to lists; write {steps: [4, 8]}"),
    ("  euler", 5, 'axes is "euler", not a mapping from settings to lists'),
    ("  - steps: [4]\n  - euler", 7, 'axes[1] is "euler", not a mapping from settings to lists'),
    ("  - steps: [4]\n  - steps: [8]\n    solver: [x]", 8, "axes[1].solver[0] cannot be used: unknown solver 'x'"),
    ("  steps: [4]\n  steps: [8]", 6, "axes.steps stands in line 6 and in line 7; keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("axes", "line", "message"), AXES_FAULTS)
def test_a_wrong_axis_is_told_with_its_line(axes: str, line: int, message: str, tmp_path: Path) -> None:
    if ": {low" in axes and "range, and" not in message:
        axes += "\nsearch: {sampler: random, trials: 3}"
    told = refusal(write(tmp_path, f"{BASE}axes:\n{axes}\n"))
    assert told.startswith(f"sweep.yaml, line {line}: ")
    assert message in told
    assert "\n" not in told


WHOLE = [
    (BASE + AXES + "images: 5", "sweep.yaml, line 3: images stands in line 3 and in line 7; keep one"),
    (BASE + AXES + "steps: 4", "sweep.yaml, line 6: axes.steps stands at the top as well; keep one"),
    (BASE + AXES + "<<: {seed: 3}", 'sweep.yaml, line 1: the sweep has the key "<<" in line 7, and merges are not read'),
    (BASE + AXES + "7: 3", "sweep.yaml, line 1: the sweep has the key 7 in line 7, and names are text; put it in quotes"),
    (BASE + AXES + "seed: [3", "sweep.yaml, line 7: no YAML, "),
    ("", "sweep.yaml holds no settings; write `name: value`, one a line"),
    ("- 1\n- 2\n", "sweep.yaml holds no settings"),
    ("hello", "sweep.yaml holds no settings"),
    (BASE, "sweep.yaml, line 1: axes is missing; give a mapping from settings to lists of values"),
    (BASE.replace("images: 100\n", "") + AXES, "sweep.yaml, line 1: images is missing; give a whole number of at least 2"),
    (BASE.replace("model: digits\n", "") + AXES, "sweep.yaml, line 1: model is missing; write one such as model: digits"),
    (BASE.replace("reference: digits\n", "") + AXES + "metrics: [is, fid]",
     'sweep.yaml, line 6: metrics[1] is "fid", which needs a reference; write reference: digits'),
    (BASE.replace("0-9", "0-12") + AXES, "sweep.yaml, line 4: labels hold 10, and the model digits draws the classes 0 to 9"),
    (BASE.replace("0-9", "[3, -1]") + AXES, "sweep.yaml, line 4: labels is [3, -1], not text such as 0-9, or a list of class"),
    (BASE.replace("0-9", "7-5") + AXES, "sweep.yaml, line 4: labels cannot be read: labels '7-5' are no list of class labels"),
    (BASE.replace("0-9", "0-999999999999") + AXES, "sweep.yaml, line 4: labels cannot be read: labels '0-999999999999' are more"),
    (BASE.replace("labels: 0-9\n", "") + AXES, "sweep.yaml, line 1: labels are missing, and the model digits draws the classes"),
    (BASE.replace("labels: 0-9", "prompts: none.txt") + AXES, "sweep.yaml, line 4: prompts cannot be read: no file of prompts at"),
    (BASE.replace("model: digits\n", "") + "axes:\n  model: [digits, nowhere]",
     "sweep.yaml, line 5: axes.model[1] cannot be used: there is no model 'nowhere'; choose digits, shapes, a folder"),
    (BASE.replace("model: digits", "model: a b") + AXES, "sweep.yaml, line 1: model cannot be used: there is no model 'a b'"),
    (BASE.replace("reference: digits", "reference: none.npz") + AXES, 'line 2: reference is "none.npz", which is not there'),
    (BASE.replace("reference: digits", "reference: [digits, shapes]") + AXES,
     "sweep.yaml, line 2: reference is a list of 2, and extractors are 1; give one, or one for each"),
    (f"{BASE}axes:\n  steps: {list(range(1, 401))}\n  guidance_scale: {list(range(251))}\n",
     "sweep.yaml, line 5: axes make 100,400 cells, more than 100,000; leave values out, or search them"),
    (f"{BASE}search: {{sampler: tpe, trials: 3}}\naxes:\n- steps: [4]\n- steps: [8]\n",
     "sweep.yaml, line 6: axes are 2 mappings, and the sampler tpe takes one; use the sampler grid"),
    (f"{BASE}axes:\n  scheduler: [flowkit, keep]\n  solver: [euler, unipc]\n",
     "line 5: axes make the cell 'keep, euler', and the scheduler 'keep' takes no solver; use a list of two mappings in axes"),
    (f"{BASE}grid: karras\naxes:\n  scheduler: [EulerDiscreteScheduler]\n  steps: [4, 8]\n",
     "and the scheduler 'EulerDiscreteScheduler' takes no grid; use a list of two mappings"),
    (f"{BASE}knobs: {{eta: 1}}\nscheduler: keep\n{AXES}", "and the scheduler 'keep' takes no eta; use a list of two mappings"),
    (f"{BASE}scheduler: EulerDiscreteScheduler\naxes:\n  knobs.eta: [0, 1]\n",
     "axes make the cell 'eta = 0', and the scheduler 'EulerDiscreteScheduler' takes no eta"),
    (f"{BASE}search: {{sampler: tpe, trials: 3}}\nscheduler: keep\naxes:\n  solver: [euler, unipc]\n",
     "axes make the cell 'euler', and the scheduler 'keep' takes no solver; search one scheduler, or one grid, at a time"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WHOLE)
def test_a_sweep_that_cannot_run_is_refused(text: str, message: str, tmp_path: Path) -> None:
    told = refusal(write(tmp_path, text))
    assert message in told
    assert "\n" not in told


def test_steps_that_a_grid_file_does_not_have(tmp_path: Path) -> None:
    Grid.uniform(4).save(tmp_path / "four.json")
    told = refusal(write(tmp_path, f"{BASE}axes:\n  grid: [uniform, four.json]\n  steps: [4, 8]\n"))
    assert told == ("sweep.yaml, line 5: axes make the cell 'grid four.json, 8 steps', and the grid four.json has 4 steps, not 8; "
                    "use a list of two mappings in axes")  # fmt: skip
    config = read(write(tmp_path, f"{BASE}axes:\n- grid: [four.json]\n- grid: [uniform]\n  steps: [4, 8]\n"))
    assert [cells.call(config, cell)["num_inference_steps"] for cell in config.cells()] == [4, 4, 8]


def test_all_faults_are_told_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = "images: many\nmodel: 3\nfoo: 1\naxes:\n  solvr: [1]\n  steps: [0, x]\n"
    assert refusal(write(tmp_path, text)).split("\n") == [
        'sweep.yaml, line 1: images is "many", not a whole number of at least 2',
        "line 2: model is 3, not digits, shapes, a folder, or owner/name of the hub",
        refusal(sweep(foo=1)).replace("foo", "line 3: foo", 1),
        "line 5: axes.solvr is no setting; did you mean solver?",
        "line 6: axes.steps[0] is 0, not a whole number of at least 1",
        'line 6: axes.steps[1] is "x", not a whole number of at least 1',
    ]
    many = refusal(write(tmp_path, f"{BASE}axes:\n  solver: {[f'x{i}' for i in range(23)]}\n")).split("\n")
    assert len(many) == 11
    assert many[-1] == "and 13 more"


def test_a_password_is_not_repeated(tmp_path: Path) -> None:
    assert "hunter2" not in refusal(write(tmp_path, BASE + AXES + "storage: postgres:me:hunter2@host\n"))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)
HOSTILE = [
    (b"model: digits\n" + b"# padding\n" * 100_001, "has 1,000,024 bytes, far more than a sweep"),
    (b"model: caf\xe9\n", "is not UTF-8 text"),
    ("model: digits\n".encode("utf-16"), "is not UTF-8 text"),
    (b"model: a\x00b\n", "line 1: the character '\\x00' is not allowed in YAML; remove it"),
    (b'seed: 0\nmodel: "\\ud800"\n', "line 2: model is '\\ud800', which holds no proper character; correct it"),
    (b'model: "a\\0b"\n', "line 1: model is 'a\\x00b', which holds no proper character; correct it"),
    (LAUGHS.encode(), "is nested too deep, or repeats itself through aliases; write the values out"),
    (b"a: &a [*a]\n", "line 1: a is nested too deep, or repeats itself through aliases; write the values out"),
    (b"a: " + b"[" * 50 + b"]" * 50, "line 1: a is nested too deep, or repeats itself through aliases"),
    (b"[" * 100_000, "is nested too deep; a sweep has a few levels"),
    (b"a: *b\n", "line 1: no YAML, found undefined alias"),
    (b"seed: " + b"9" * 5000, 'line 1: seed is "9999'),
    (b"seed: !!set {a, b}\n", "line 1: seed has the tag"),
    (b"? [a, b]\n: 3\n", "the sweep has the key [] in line 1"),
    (b"%TAG ! tag:yaml.org,2002:python/\n---\nseed: !object/apply:os.system [ls]\n", "line 3: seed has the tag"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), HOSTILE)
def test_hostile_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_bytes(content)
    told = refusal(tmp_path / "sweep.yaml")
    assert told.startswith("sweep.yaml")
    assert message in told


EDITS = ["[", "]", "{", "}", ": ", ", ", "- ", "\n", "\n  ", "none", "true", "-1", ".inf", "1e3", "'", '"', "&a ", "*a",
         "!!str ", "| ", "# ", "? ", "~", "<<", "9" * 30, "axes", "steps", "low", "digits", "knobs.", "\u00e9", "@"]  # fmt: skip
EDITED = f"""{BASE}search: {{sampler: tpe, trials: 3}}
knobs: {{eta: 1}}
axes:
  steps: {{low: 2, high: 32, step: 1, log: true}}
  guidance_scale: [1.0, 3]
  guidance: [none, {{method: AdaptiveGuidance, threshold: 0.99}}]
"""


@given(
    st.lists(st.tuples(st.integers(0, len(EDITED)), st.integers(0, 6), st.sampled_from(EDITS)), min_size=1, max_size=4)
)
@settings(max_examples=300, deadline=None)
def test_an_edited_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    text = EDITED
    for place, dropped, put in edits:
        text = text[:place] + put + text[place + dropped :]
    path = write(tmp_path_factory.getbasetemp(), text, "edited.yaml")
    told = ""
    try:
        described = read(path).describe()
    except ValueError as error:
        told = str(error)
    if told:
        assert told.startswith("edited.yaml")
        assert "pydantic" not in told
    else:
        assert json.loads(json.dumps(described)) == described


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"no sweep file at {tmp_path / 'none.yaml'}; check the path"
    assert refusal(tmp_path) == f"no sweep file at {tmp_path}; check the path"


PYTHON = [
    ({"images": "100"}, 'images is "100", not a whole number of at least 2'),
    ({"axes": {"steps": [4, "8"]}}, 'axes.steps[1] is "8", not a whole number of at least 1'),
    ({"axes": {"steps": {4, 8}}}, "axes.steps is {"),
    ({"knobs": {"eta": 1 + 2j}}, "knobs.eta is (1+2j); give text, a number, a list or a mapping"),
    ({"knobs": {"eta": float("inf")}}, "knobs.eta is inf; give a finite number"),
    ({"call": {3: 4}}, "call has the key 3, which is not text"),
    ({"search": {"sampler": "tpe"}}, "search lacks trials"),
]


@pytest.mark.parametrize(("changes", "message"), PYTHON)
def test_a_mapping_of_python_is_told_by_field(changes: dict[str, Any], message: str) -> None:
    assert refusal(sweep(**changes)).startswith(message)


def test_a_mapping_within_itself_is_refused() -> None:
    call: dict[str, Any] = {}
    call["call"] = call
    assert refusal(sweep(call=call)) == "call.call is nested too deep, or within itself; a sweep has a few levels"


def test_fields_and_their_defaults() -> None:
    config = read(sweep())
    expected = {"name": "sweep", "scheduler": "flowkit", "metrics": ["fid"], "batch_size": 64, "seed": 0, "keep": 8, "retries": 2,
                "dtype": "auto", "device": "auto", "objectives": ["fid", "evaluations"], "exact": False}  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.search.model_dump() == {"sampler": "grid", "trials": None, "seed": 0}
    assert config.axes == [{"steps": [4, 8]}]
    assert read(sweep(metrics="kid/pixels")).objectives == ["kid/pixels", "evaluations"]
    with pytest.raises(ValueError, match="frozen"):
        config.images = 3


def test_objectives_are_keys_of_the_metrics() -> None:
    chosen = {"extractor": ["classifier", "pixels"], "metrics": ["fid", "kid/pixels"]}
    for key in ("fid", "fid/pixels", "kid/pixels", "evaluations", "seconds"):
        assert read(sweep(**chosen, objectives=[key])).objectives == [key]
    assert "choose fid, fid/pixels, kid/pixels, evaluations, seconds" in refusal(sweep(**chosen, objectives=["kid"]))


def test_numbers_and_words_of_yaml(tmp_path: Path) -> None:
    numbers = "a: 1e-3, b: '1e-3', c: 1_000, d: -.5, e: 012, f: 2020-01-01, g: off, h: ~, i: 'on'"
    axes = "axes:\n  guidance_scale: [1, 1e1, +2.5E+1]\n  lora: [none]\n  grid: [null, karras]\n"
    config = read(write(tmp_path, f"{BASE}call: {{{numbers}}}\n{axes}"))
    assert config.call == {"a": 0.001, "b": "1e-3", "c": 1000, "d": -0.5, "e": "012", "f": "2020-01-01", "g": False, "h": None,
                           "i": "on"}  # fmt: skip
    assert config.axes == [{"guidance_scale": [1.0, 10.0, 25.0], "lora": [None], "grid": [None, "karras"]}]


def test_a_cell_says_what_varies(tmp_path: Path) -> None:
    linear().save(tmp_path / "linear.safetensors")
    text = f"""{BASE}scheduler: flowkit
call: {{height: 8}}
axes:
  solver: [unipc]
  steps: [8, 1]
  guidance_scale: [3, 1.5]
  guidance: [none, {{method: AdaptiveGuidance, threshold: 0.991}}, {{method: LinearAdaptiveGuidance, file: linear.safetensors}}]
  knobs.eta: [0.5, 0]
"""
    config = read(write(tmp_path, text))
    found = config.cells()
    assert len(found) == 24
    assert [cell.name for cell in found[:5]] == [
        "8 steps, w = 3, eta = 0.5",
        "8 steps, w = 3, eta = 0",
        "8 steps, w = 3, AdaptiveGuidance(threshold=0.991), eta = 0.5",
        "8 steps, w = 3, AdaptiveGuidance(threshold=0.991), eta = 0",
        "8 steps, w = 3, LinearAdaptiveGuidance(file=linear.safetensors), eta = 0.5",
    ]
    assert found[-1].name == "1 step, w = 1.5, LinearAdaptiveGuidance(file=linear.safetensors), eta = 0"
    assert found[2].key.startswith("8steps-w3-AdaptiveGuidance-0.991-eta=0.5-")
    cell = found[2]
    assert [cell.get(name) for name in ("model", "steps", "knobs.eta", "call.height", "lora")] == [
        "digits",
        8,
        0.5,
        8,
        None,
    ]
    assert cells.call(config, cell) == {"num_inference_steps": 8, "guidance_scale": 3.0, "height": 8}
    assert cells.knobs(config, cell) == {"solver": "unipc", "eta": 0.5}
    part = cells.guidance(config, cell)
    assert isinstance(part, flowkit.AdaptiveGuidance)
    assert part.threshold == 0.991
    assert isinstance(cells.guidance(config, found[4]), flowkit.LinearAdaptiveGuidance)
    assert cells.guidance(config, found[0]) is None
    assert [cell.name for cell in read(sweep(axes={"steps": [4]})).cells()] == ["plain"]


def test_combining_methods_take_the_scale_of_the_cell() -> None:
    axes = {
        "guidance_scale": [2, 3],
        "guidance": [{"method": "ProjectedGuidance"}, {"method": "ZeroStarGuidance", "scale": 5}],
    }
    config = read(sweep(axes=axes))
    parts: list[Any] = [cells.guidance(config, cell) for cell in config.cells()]
    assert [part.scale for part in parts] == [2, 5, 3, 5]


def test_what_a_cell_gives_to_its_scheduler_makes_one(tmp_path: Path) -> None:
    Grid.uniform(3).save(tmp_path / "three.json")
    axes = (
        "axes:\n- scheduler: [keep, FlowMatchEulerDiscreteScheduler]\n- {solver: [heun], grid: [three.json, karras]}\n"
    )
    config = read(write(tmp_path, BASE + axes))
    current = flowkit.RectifiedFlowScheduler()
    made: list[Any] = [swap.make(current, cell.get("scheduler"), cells.knobs(config, cell)) for cell in config.cells()]
    assert made[0] is current
    assert type(made[1]).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert made[2].grid == Grid.uniform(3)
    assert made[3].config["solver"] == "heun"
    assert [cell.name for cell in config.cells()] == [
        "keep", "FlowMatchEulerDiscreteScheduler", "flowkit, heun, grid three.json", "flowkit, heun, grid karras",
    ]  # fmt: skip


def test_inputs_of_labels_and_prompts(tmp_path: Path) -> None:
    assert cells.inputs(read(sweep(labels="3,5-6"))) == [{"class_labels": label} for label in (3, 5, 6)]
    assert cells.inputs(read(sweep(labels=[3, 3]))) == [{"class_labels": 3}] * 2
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    text = BASE.replace("digits\n", "owner/name\n", 1).replace("labels: 0-9", "prompts: prompts.txt") + AXES
    text += "call: {negative_prompt: ugly, height: 8}\n"
    config = read(write(tmp_path, text))
    assert cells.inputs(config) == [{"negative_prompt": "ugly", "prompt": prompt} for prompt in ("a cat", "a dog")]
    assert cells.call(config, config.cells()[0]) == {"num_inference_steps": 4, "height": 8}
    assert cells.inputs(read(sweep(model="owner/name", labels=None))) is None
    rows = '{"prompt": "a", "guidance_scale": 2}\n'
    write(tmp_path, rows, "rows.jsonl")
    told = refusal(write(tmp_path, text.replace("prompts.txt", "rows.jsonl") + "guidance_scale: 3"))
    assert "guidance_scale stands in the prompts as well, as guidance_scale; keep one" in told
    write(tmp_path, '{"prompt": "a", "image": "a.png"}\n', "rows.jsonl")
    assert "have the argument image, and sweeps read no pictures" in refusal(
        write(tmp_path, text.replace("prompts.txt", "rows.jsonl"))
    )


def test_files_lie_beside_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "models" / "student" / "model_index.json").write_text("{}")
    (tmp_path / "stats.npz").write_bytes(b"")
    weights.write(tmp_path / "style.safetensors", {"a": torch.zeros(1)})
    axes = "axes:\n  model: [models/student, owner/name]\n  lora: [none, style.safetensors, o/n-v1.5]\n"
    text = f"reference: stats.npz\nimages: 2\n{axes}"
    path = write(tmp_path, text)
    monkeypatch.chdir("/")
    config = read(path)
    assert config.file == path
    assert config.name == "sweep"
    assert cells.references(config) == str(tmp_path / "stats.npz")
    found = config.cells()
    assert [cells.model(config, cell) for cell in found] == [str(tmp_path / "models" / "student")] * 3 + [
        "owner/name"
    ] * 3
    assert [cells.lora(config, cell) for cell in found[:3]] == [None, str(tmp_path / "style.safetensors"), "o/n-v1.5"]
    monkeypatch.chdir(tmp_path)
    assert read(Path("sweep.yaml")).cells() == found
    assert read(yaml.safe_load(text)).cells() == found
    assert "models has no model_index.json" in refusal(sweep(model="models"))


def test_a_search_chooses_cells() -> None:
    axes = {"steps": {"low": 2, "high": 32, "step": 1, "log": True}, "guidance_scale": {"low": 1, "high": 3},
            "solver": ["euler", "unipc"], "guidance": [None, {"method": "AdaptiveGuidance"}]}  # fmt: skip
    config = read(sweep(search={"sampler": "tpe", "trials": 9}, axes=axes))
    choices = config.choices()
    assert choices["steps"] == Range(low=2, high=32, step=1, log=True)
    assert choices["guidance_scale"] == Range(low=1.0, high=3.0)
    assert choices["solver"] == ["euler", "unipc"]
    chosen = {"guidance": {"method": "AdaptiveGuidance"}, "guidance_scale": 3, "steps": 7, "solver": "unipc"}
    cell = config.cell(chosen)
    assert cell.name == "unipc, 7 steps, w = 3, AdaptiveGuidance()"
    assert cell == config.cell({**chosen, "guidance_scale": 3.0})
    for wrong, told in ({"steps": 33}, "steps=33 is not among"), ({"solver": "x"}, "solver='x' is not among"):
        with pytest.raises(ValueError, match=told):
            config.cell(chosen | wrong)
    with pytest.raises(
        ValueError, match="a cell has one value for each of steps, guidance_scale, solver, guidance, got steps"
    ):
        config.cell({"steps": 4})


def test_a_cell_of_a_grid_is_the_same_by_choice() -> None:
    config = read(sweep(axes=[{"steps": [4, 8], "solver": ["euler"]}, {"scheduler": ["keep"]}]))
    assert [config.cell(cell.settings) for cell in config.cells()] == config.cells()


def test_files_that_decide_are_described_by_their_content(tmp_path: Path) -> None:
    Grid.uniform(4).save(tmp_path / "four.json")
    linear().save(tmp_path / "linear.safetensors")
    weights.write(tmp_path / "style.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = read(write(tmp_path, """model: owner/name
reference: digits
images: 2
prompts: prompts.txt
grid: four.json
axes:
  lora: [none, style.safetensors]
  guidance: [{method: LinearAdaptiveGuidance, file: linear.safetensors}]
"""))  # fmt: skip
    before = config.describe()
    assert json.loads(json.dumps(before)) == before

    def changed(name: str, change: Any) -> dict[str, Any]:
        content = (tmp_path / name).read_bytes()
        change()
        after = config.describe()
        (tmp_path / name).write_bytes(content)
        return after

    for name, change in {
        "four.json": lambda: Grid.shifted(4, 3.0).save(tmp_path / "four.json"),
        "linear.safetensors": lambda: linear(5).save(tmp_path / "linear.safetensors"),
        "style.safetensors": lambda: weights.write(tmp_path / "style.safetensors", {"a": torch.ones(1)}),
        "prompts.txt": lambda: (tmp_path / "prompts.txt").write_text("a dog\n"),
    }.items():
        assert changed(name, change) != before, name
    assert config.describe() == before


DECIDES = {"images": 99, "batch_size": 8, "seed": 1, "exact": True, "dtype": "float32", "labels": "0-8", "scheduler": "keep",
           "metrics": ["fid", "kid"], "extractor": "classifier", "call": {"a": 1}, "axes": {"steps": [4]}, "guidance_scale": 2.0,
           "objectives": ["fid"], "variant": "fp16", "reference": "shapes"}  # fmt: skip
DOES_NOT = {
    "name": "other",
    "storage": "sqlite:///x.db",
    "trackers": ["tensorboard"],
    "retries": 0,
    "keep": 0,
    "device": "cpu",
}


@pytest.mark.parametrize(("field", "value"), DECIDES.items())
def test_what_decides_is_described(field: str, value: Any) -> None:
    assert read(sweep(**{field: value})).describe() != read(sweep()).describe()


@pytest.mark.parametrize(("field", "value"), DOES_NOT.items())
def test_what_does_not_decide_is_not(field: str, value: Any) -> None:
    config = read(sweep(**{field: value}))
    assert config.describe() == read(sweep()).describe()
    assert config.cells() == read(sweep()).cells()


# What a grid may be made of; equal values of a setting never meet twice in one axis.
VALUES: dict[str, list[Any]] = {
    "model": ["digits", "shapes", "owner/name"],
    "lora": [None, "owner/style", "owner/other"],
    "solver": ["euler", "unipc", "heun"],
    "steps": [1, 4, 8, 16],
    "guidance_scale": [1.0, 1.5, 3.0],
    "guidance": [None, {"method": "AdaptiveGuidance", "threshold": 0.9}, {"method": "ZeroStarGuidance", "scale": 2}],
    "knobs.eta": [0, 0.5, 1],
    "call.note": ["x", "y", [1, {"z": None}], True, 1e-3, ""],
}  # fmt: skip


@st.composite
def grids(draw: st.DrawFn) -> dict[str, list[Any]]:
    names = draw(st.lists(st.sampled_from([n for n in VALUES if n != "model"]), unique=True, max_size=4))
    names.insert(draw(st.integers(0, len(names))), "model")
    return {name: draw(st.permutations(VALUES[name]))[: draw(st.integers(1, 3))] for name in names}


def identity(cell: Any) -> str:
    everything = {name: cell.get(name) for name in VALUES}
    return json.dumps(everything, sort_keys=True)


@given(st.lists(grids(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_cells_are_all_combinations_once_and_grouped(mappings: list[dict[str, list[Any]]]) -> None:
    config = read(sweep(model=None, axes=mappings))
    found = config.cells()
    expected = {}
    for axes in mappings:
        for values in itertools.product(*axes.values()):
            chosen = dict.fromkeys(VALUES) | dict(zip(axes, values, strict=True))
            expected[json.dumps(chosen, sort_keys=True)] = chosen
    assert sorted(map(identity, found)) == sorted(expected)
    assert len({cell.key for cell in found}) == len(found)
    assert all(re.fullmatch(r"[\w+=][\w.+=-]{0,59}-[0-9a-f]{8}", cell.key, re.ASCII) for cell in found)
    assert len({cell.name for cell in found}) == len(found)
    # Equal models stand together, within them equal LoRAs, and otherwise the order is that of the file.
    for names in (["model"], ["model", "lora"]):
        runs = [key for key, _ in itertools.groupby([cell.get(name) for name in names] for cell in found)]
        assert len(runs) == len({json.dumps(run) for run in runs})
    order = {text: number for number, text in enumerate(expected)}
    for _, group in itertools.groupby(found, lambda cell: (cell.get("model"), cell.get("lora"))):
        places = [order[identity(cell)] for cell in group]
        assert places == sorted(places)


@given(grids(), st.integers(0, 2**32), st.sampled_from([None, True, False]), st.sampled_from([20, 80, 1000]))
@settings(max_examples=60, deadline=None)
def test_nothing_depends_on_how_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, axes: dict[str, list[Any]], seed: int, style: bool | None, width: int
) -> None:
    fields = sweep(model=None, axes=axes, call={"b": 1.5, "a": "no"}, name="sweep")
    config = read(copy.deepcopy(fields))
    order = list(fields)
    random.Random(seed).shuffle(order)
    text = yaml.safe_dump(
        {name: fields[name] for name in order}, sort_keys=False, default_flow_style=style, width=width
    )
    other = read(write(tmp_path_factory.mktemp("sweep"), f"# a comment\n{text}\n...\n"))
    assert other.model_dump() == config.model_dump()
    assert other.describe() == config.describe()
    assert other.cells() == config.cells()


def test_round_trips() -> None:
    search = {"sampler": "nsga2", "trials": 4}
    for fields in (
        sweep(),
        sweep(axes=[{"steps": [4]}, {"solver": ["euler"]}]),
        sweep(search=search, axes={"steps": {"low": 1, "high": 9}}),
    ):
        config = read(fields)
        again = read(config.model_dump(exclude_unset=True))
        assert again == config
        assert again.describe() == config.describe()
        assert pickle.loads(pickle.dumps(config)) == config
        assert read(json.loads(json.dumps(config.model_dump(exclude_unset=True)))) == config


def test_numbers_and_paths_of_python(tmp_path: Path) -> None:
    numbers: Any = {"images": np.int64(100), "axes": {"steps": (4, np.int32(8)), "guidance_scale": [np.float32(1.5)]}}
    config = read(sweep(**numbers))
    assert config.axes == [{"steps": [4, 8], "guidance_scale": [1.5]}]
    assert {type(value) for values in config.axes[0].values() for value in values} == {int, float}
    Grid.uniform(4).save(tmp_path / "four.json")
    assert read(sweep(axes={"grid": [tmp_path / "four.json"]})).cells()[0].get("grid") == str(tmp_path / "four.json")


def test_reading_leaves_its_mapping_alone() -> None:
    fields = sweep(axes={"guidance": ["none", {"method": "AdaptiveGuidance"}]})
    before = copy.deepcopy(fields)
    assert isinstance(read(fields), SweepConfig)
    assert fields == before
