"""The report of a sweep: differences, intervals, the front, filters, exports, failures, and texts that mean harm."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from flowkit.cli import app
from flowkit.eval import report_paired, report_table
from flowkit.eval.intervals import interval, jackknife, paired
from flowkit.eval.report import write_report
from flowkit.eval.report_front import choices, front
from flowkit.eval.report_rows import read
from flowkit.eval.report_spec import split
from flowkit.eval.tables import export

from . import pages
from .scripts import script_module

CELLS = 24
ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "report.py"
DOCS = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with pages.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made-up sweep: two metrics, pictures, a failed cell, missing values."""
    folder = tmp_path_factory.mktemp("sweep")
    with script_module(BENCHMARK) as benchmark:
        benchmark.results(CELLS, folder)
    write_report(folder)
    return folder


@pytest.fixture(params=pages.SIZES, ids=pages.NAMES)
def page(request: pytest.FixtureRequest, browser: Browser, made: Path) -> Iterator[Page]:
    with pages.opened(browser, made / "report.html", *request.param) as page:
        yield page


@pytest.fixture
def desktop(browser: Browser, made: Path) -> Iterator[Page]:
    with pages.opened(browser, made / "report.html", *pages.SIZES[0]) as page:
        yield page


def _written(folder: Path, **changes: Any) -> Path:
    """A small sweep in a folder: three solvers that pair, with changes."""
    rows = [
        {
            "name": name,
            "settings": {"solver": name, "steps": 4, "guidance_scale": 3.0},
            "evaluations": evaluations,
            "seconds": 2.0 * evaluations,
            "pairs": "seed 0",
            "metrics": {"fid": {"value": value, "left_out": [value + d * e for e in (-0.1, 0.02, 0.08, 0.0)]}},
        }
        for name, evaluations, value, d in (("euler", 4, 3.0, 1.0), ("heun", 8, 2.0, 0.9), ("unipc", 4, 2.5, 1.1))
    ]
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"title": "small", "rows": rows} | changes))
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    return rows


def _shown_names(page: Page) -> list[str]:
    return page.locator("tbody tr:not([hidden]) .name").all_text_contents()


# Intervals and differences


def test_intervals_are_students(tmp_path: Path) -> None:
    results = read(_written(tmp_path))
    figure = jackknife(3.0, [2.9, 3.02, 3.08, 3.0])
    half = 3.182446 * figure.se  # Student's t for 3 degrees of freedom at 95 %
    assert report_paired.bounds(results.rows[0], "fid") == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert report_paired.bounds(results.rows[0], "fid") == interval(3.0, figure.se, 3)
    cell = next(c for c in report_table.columns(results) if c.kind == "metric").cells[0]
    assert (cell.text, cell.error, cell.interval) == ("3.00", "0.11", "(2.64, 3.36)")


def test_the_browser_computes_what_intervals_compute(desktop: Page, made: Path) -> None:
    results = read(made)
    compared = report_paired.compared(results)
    assert compared == ["fid", "clip"]
    shown: list[Any] = desktop.evaluate(
        """() => Object.keys(data.figures).map((key) => rows.map((_, b) => {
          baseline = b;
          return rows.map((_, row) => difference(row, key));
        }))"""
    )
    count = 0
    for key, bases in zip(compared, shown, strict=True):
        lower = results.metrics[key].lower
        for base, differences in enumerate(bases):
            for row, found in enumerate(differences):
                wanted = report_paired.difference(results.rows, row, base, key, lower)
                assert (found is None) == (wanted is None)
                if not found or not wanted:
                    continue
                one, other = (results.rows[i].measured(key) for i in (row, base))
                exact = paired(jackknife(one.value or 0, one.left_out), jackknife(other.value or 0, other.left_out))
                assert found["raw"] == pytest.approx([exact.value, *exact.details["interval"]], rel=1e-9, abs=1e-12)
                star = "*" if wanted.mark else ""
                assert found["text"] == wanted.text + star
                assert (found["interval"], found["mark"]) == (wanted.interval, wanted.mark)
                low, high = exact.details["interval"]
                if wanted.mark:
                    assert low * high > 0
                    assert (wanted.mark == "better") == ((high < 0) == lower)
                count += 1
    failed = sum(bool(row.error) for row in results.rows)
    assert count > (CELLS - failed) ** 2


def test_a_difference_needs_the_same_pairs_and_chunks(tmp_path: Path) -> None:
    rows = _rows(_written(tmp_path))
    rows[0]["pairs"] = "seed 1"
    rows[1]["metrics"]["fid"]["left_out"] = [2.0, 2.1]
    results = read(_written(tmp_path, rows=[*rows, {**rows[2], "name": "twin"}]))
    found = [report_paired.difference(results.rows, i, 2, "fid", True) is not None for i in range(4)]
    assert found == [False, False, True, True]
    assert report_paired.candidates(results) == {0, 1, 2, 3}
    assert report_paired.compared(read(_written(tmp_path, rows=rows))) == []  # no two of them


def test_rounding_of_the_network_is_no_difference(tmp_path: Path) -> None:
    rows = _rows(_written(tmp_path))
    same = copy.deepcopy(rows[0])
    same["name"] = "parity"
    fid = same["metrics"]["fid"]
    fid["value"] += 1e-8
    fid["left_out"] = [value + 1e-8 + 1e-12 * i for i, value in enumerate(fid["left_out"])]
    results = read(_written(tmp_path, rows=[*rows, same]))
    found = report_paired.difference(results.rows, 3, 0, "fid", True)
    assert found
    assert (found.text, found.interval, found.mark) == ("0.000", "(0.000, 0.000)", "")


def test_another_row_becomes_the_baseline_by_keyboard(page: Page, made: Path) -> None:
    results = read(made)
    first = results.baseline
    assert first is not None
    before = page.locator("td.difference").all_text_contents()
    assert page.locator(".against").text_content() == results.rows[first].name
    page.locator("input[name=baseline]:checked").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator(".against").text_content() == results.rows[first - 1].name
    row = page.locator(f"#row-{first + 1} td.difference").first
    wanted = report_paired.difference(results.rows, first, first - 1, "fid", True)
    assert wanted
    assert row.text_content() == f"{wanted.text}{'*' if wanted.mark else ''} {wanted.interval}"
    assert page.locator(f"#row-{first} td.difference").first.text_content() == "baseline"
    page.keyboard.press("ArrowDown")
    # What the script writes is what stood there before it ran.
    assert page.locator("td.difference").all_text_contents() == before


def test_the_baseline_is_the_named_row_else_the_best(tmp_path: Path) -> None:
    assert read(_written(tmp_path)).baseline == 1
    assert read(_written(tmp_path, baseline="unipc")).baseline == 2
    rows = [*_rows(tmp_path), {"name": "broken", "error": "out of memory"}]
    assert read(_written(tmp_path, rows=rows, baseline="broken")).baseline == 1
    with pytest.raises(ValueError, match='baseline is "nobody", not the name of a row'):
        read(_written(tmp_path, baseline="nobody"))
    for row in rows[:3]:
        row["metrics"] = {"clip": row["metrics"].pop("fid")}
    assert read(_written(tmp_path, rows=rows)).baseline == 0  # higher is better


# The front


_values = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(_values, _values, _values), min_size=1, max_size=30))
def test_the_front_and_the_choices_are_their_definitions(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[float, float, float]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "front"
    rows = [
        {"name": str(i), "evaluations": e, "metrics": {"fid": {"value": f}, "recall": {"value": r}}}
        for i, (e, f, r) in enumerate(cells)
    ]
    asked = [("fid", "lower"), ("evaluations", "lower"), ("recall", "higher")]
    objectives = [{"key": key, "direction": direction} for key, direction in asked]
    results = read(_written(folder, rows=rows, objectives=objectives))
    beaten = {
        i
        for i, (e, f, r) in enumerate(cells)
        for other in cells
        if other != (e, f, r) and other[0] <= e and other[1] <= f and other[2] >= r
    }
    assert front(results.rows, results.objectives) == [i for i in range(len(cells)) if i not in beaten]
    found = choices(results)
    budgets = sorted({e for e, _, _ in cells})
    best = [min(f for e, f, _ in cells if e <= budget) for budget in budgets]
    steps = [(b, v) for i, (b, v) in enumerate(zip(budgets, best, strict=True)) if not i or v < best[i - 1]]
    assert [(cells[choice.number][0], cells[choice.number][1]) for choice in found] == steps


def test_a_choice_names_the_rows_that_are_as_good(tmp_path: Path) -> None:
    rows = _rows(_written(tmp_path))
    close = copy.deepcopy(rows[1])
    close |= {"name": "close", "evaluations": 4}
    fid = close["metrics"]["fid"]
    fid["value"] += 0.01
    fid["left_out"] = [value + d for value, d in zip(fid["left_out"], (0.3, -0.1, 0.1, -0.3), strict=True)]
    found = choices(read(_written(tmp_path, rows=[*rows, close])))
    assert [(c.number, c.budget, c.rivals, c.gains) for c in found] == [
        (3, "4 evaluations", [2], True),
        (1, "8 evaluations", [3, 2], False),
    ] or [(c.number, c.budget, c.gains) for c in found] == [(3, "4 evaluations", True), (1, "8 evaluations", False)]


def test_seconds_can_be_the_budget(tmp_path: Path) -> None:
    objectives = [{"key": "seconds", "direction": "lower"}, {"key": "fid", "direction": "lower"}]
    found = choices(read(_written(tmp_path, objectives=objectives)))
    assert [(c.number, c.budget) for c in found] == [(2, "8.0\N{NO-BREAK SPACE}s"), (1, "16.0\N{NO-BREAK SPACE}s")]


def test_a_metric_against_a_metric_has_a_plot(tmp_path: Path, browser: Browser) -> None:
    rows = _rows(_written(tmp_path))
    for row, clip in zip(rows, (0.3, 0.2, 0.25), strict=True):
        row["metrics"]["clip"] = {"value": clip}
    objectives = [{"key": "fid", "direction": "lower"}, {"key": "clip", "direction": "higher"}]
    path = write_report(_written(tmp_path, rows=rows, objectives=objectives))
    with pages.opened(browser, path, *pages.SIZES[0]) as page:
        charts = page.locator(".charts svg")
        labels = [charts.nth(i).get_attribute("aria-label") for i in range(charts.count())]
        assert labels[-1] == "FD against CLIP score, higher is better"
        assert charts.last.locator(".point.best").count() == 3  # each gives way in one of the two


# Settings


def test_settings_that_vary_are_columns_and_the_rest_is_said_once(tmp_path: Path, browser: Browser) -> None:
    rows = _rows(_written(tmp_path))
    rows[1]["steps"] = 4
    del rows[2]["settings"]["guidance_scale"]
    results = read(_written(tmp_path, rows=rows))
    assert report_table.varying(results.rows) == ["solver", "guidance_scale"]
    assert report_table.constant(results.rows) == {"steps": "4"}
    with pages.opened(browser, write_report(tmp_path), *pages.SIZES[0]) as page:
        heads = [head.split("\N{NO-BREAK SPACE}")[0].strip() for head in page.locator("th").all_inner_texts()]
        assert heads == ["Method", "Solver", "Guidance scale", "Evaluations", "FD", "FD difference", "Time"]
        assert page.get_by_text("The same in every row: Steps 4.").is_visible()
        page.locator("select").nth(1).select_option(label="–")  # noqa: RUF001
        assert _shown_names(page) == ["unipc"]


def test_numbers_that_are_none_are_unknown(tmp_path: Path) -> None:
    rows = _rows(_written(tmp_path))
    for row, odd in zip(rows, (math.nan, 10**400, -1e200), strict=True):
        row["settings"]["scale"] = odd
        row["metrics"]["fid"]["left_out"][0] = odd
    results = read(_written(tmp_path, rows=rows))
    assert report_table.varying(results.rows) == ["solver", "scale"]
    assert [row.measured("fid").left_out for row in results.rows] == [(), (), ()]
    assert report_paired.compared(results) == []
    assert json.loads(export(tmp_path, "json"))[0]["scale"] == "nan"
    write_report(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"settings": {"solver": ["euler"]}}, r'settings\.solver is \["euler"\], not a string, a number'),
        ({"settings": {"steps": 4}, "steps": 8}, r"settings\.steps is 4, not the 8 of rows\[0\]\.steps"),
        ({"metrics": {"fid": {"value": 1, "left_out": [1]}}}, r"left_out is \[1\], not a list of at least 2"),
        ({"metrics": {"fid": {"value": 1, "left_out": [1, "2"]}}}, r'left_out is "2", not a number'),
        ({"metrics": {"fid": {"value": 1}}, "error": "broken"}, r'error is "broken", not null'),
        ({"spec": "text"}, r'rows\[0\]\.spec is "text", not an object'),
    ],
)
def test_says_what_is_wrong_with_a_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(_written(tmp_path, rows=[{"name": "x"} | row]))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"key": "fdi", "direction": "lower"}, r'objectives\[0\]\.key is "fdi", not one of evaluations, fid, seconds'),
        ({"key": "fid", "direction": "down"}, r'direction is "down", not "lower" or "higher"'),
    ],
)
def test_says_what_is_wrong_with_an_objective(tmp_path: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(_written(tmp_path, objectives=[objective]))


# The page


def test_nothing_is_cut_off_and_pictures_are_there(page: Page) -> None:
    assert pages.nothing_is_cut_off(page)
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 1024)")
    assert page.locator(".samples figure:visible").count() == CELLS - 1


def test_a_difference_stands_beside_its_metric(page: Page) -> None:
    places = (
        page.locator("tbody tr")
        .first.locator("td.metric")
        .evaluate_all(
            "(cells) => cells.map((cell) => [cell.getBoundingClientRect().left, cell.getBoundingClientRect().top])"
        )
    )
    for (left, top), (right, level) in zip(places[::2], places[1::2], strict=True):
        assert left < right
        assert top == pytest.approx(level, abs=1)


def test_a_filter_acts_on_table_plots_and_pictures(page: Page) -> None:
    everything = _shown_names(page)
    page.get_by_label("Solver").select_option(label="heun")
    wanted = [name for name in everything if name.startswith("heun")]
    assert _shown_names(page) == wanted
    assert page.locator(".tools output").text_content() == f"{len(wanted)} of {CELLS} rows"
    assert page.locator(".charts svg").first.locator(".point:not(.off)").count() == len(wanted) - 1  # one has failed
    assert page.locator(".samples figure:visible").count() == len(wanted) - 1
    page.get_by_role("searchbox").fill("6 STEPS heun")
    assert _shown_names(page) == [name for name in wanted if ", 6 steps" in name]
    page.get_by_role("button", name="Show all").click()
    assert _shown_names(page) == everything


def test_a_link_to_a_hidden_row_shows_it(page: Page) -> None:
    link = page.locator(".choices .pick a").first
    page.get_by_role("searchbox").fill("nothing has this")
    assert _shown_names(page) == []
    link.click()
    assert page.locator(f"tr{link.get_attribute('href')}").is_visible()
    assert page.locator(".tools output").text_content() == f"{CELLS} of {CELLS} rows"


def test_failed_rows_come_last_and_are_told(page: Page) -> None:
    (failed,) = [name for name in _shown_names(page) if name == _shown_names(page)[-1]]
    assert page.locator("tbody tr.failed .name").all_text_contents() == [failed]
    for _ in range(2):
        page.get_by_role("button", name="FD", exact=False).first.click()
        assert _shown_names(page)[-1] == failed
        # Cells without the second metric stand before the failed one, after all others.
        page.get_by_role("button", name="CLIP score").first.click()
        keys = page.locator("tbody tr").evaluate_all("(rows) => rows.map((row) => row.cells[6].dataset.key)")
        assert "" not in keys[: keys.index("")] + [k for k in keys if k]
        assert _shown_names(page)[-1] == failed
    assert "tried to allocate 2.0 GiB" in (page.locator(".failures pre").text_content() or "")


def test_pictures_follow_the_order_of_the_table(desktop: Page) -> None:
    desktop.get_by_role("button", name="FD", exact=False).first.click()
    drawn = desktop.locator(".samples figcaption bdi").all_text_contents()
    assert drawn == [name for name in _shown_names(desktop) if name in drawn]


def test_a_point_shows_its_card_and_leads_to_its_row(desktop: Page, made: Path) -> None:
    card = desktop.locator("#card")
    assert not card.is_visible()
    points = desktop.locator(".charts svg").first.locator(".point")
    assert points.evaluate_all("(all) => all.filter((point) => point.tabIndex === 0).length") == 1
    desktop.locator(".charts svg").first.locator(".point[tabindex='0']").focus()
    first = card.locator("strong").text_content()
    assert card.is_visible()
    assert card.locator("img").count() == 1
    for label in ("Solver", "Steps", "Evaluations", "FD"):
        assert card.get_by_text(label, exact=True).is_visible()
    desktop.keyboard.press("ArrowRight")
    name = card.locator("strong").text_content()
    assert name != first
    desktop.keyboard.press("Enter")
    number = [row.name for row in read(made).rows].index(name or "") + 1
    assert desktop.evaluate("location.hash") == f"#row-{number}"
    desktop.keyboard.press("Escape")
    assert not card.is_visible()


def test_each_row_tells_how_to_repeat_it(desktop: Page) -> None:
    desktop.get_by_text("How to repeat each row: what differs").click()
    desktop.locator("details details summary").nth(2).click()
    part = desktop.locator("details details[open]")
    assert part.locator("dt").all_text_contents() == ["pipeline.settings.solver", "pipeline.settings.steps"]
    desktop.get_by_text("How to repeat every row").click()
    assert desktop.get_by_text("extractor.weights_sha256").is_visible()


_leaves: st.SearchStrategy[Any] = st.integers(0, 2) | st.just({})
_specs = st.recursive(
    st.dictionaries(st.sampled_from("abc"), _leaves, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | _leaves, max_size=3),
)


def _merged(shared: Any, own: Any) -> Any:
    if not isinstance(shared, dict) or not isinstance(own, dict):
        return own
    keys = [*shared, *(key for key in own if key not in shared)]
    return {k: _merged(shared[k], own[k]) if k in shared and k in own else own.get(k, shared.get(k)) for k in keys}


@given(st.lists(_specs, min_size=1, max_size=4))
def test_nothing_of_a_provenance_is_lost(specs: list[dict[str, Any]]) -> None:
    def full(spec: Any) -> Any:  # an empty object says nothing
        return {k: full(v) for k, v in spec.items() if v != {} and full(v) != {}} if isinstance(spec, dict) else spec

    shared, rest = split(specs)
    assert [full(_merged(shared, own)) for own in rest] == [full(spec) for spec in specs]


def test_works_without_scripts(browser: Browser, made: Path) -> None:
    with pages.opened(browser, made / "report.html", *pages.SIZES[0], scripts=False) as page:
        assert page.locator("tbody tr:visible").count() == CELLS
        assert page.locator(".samples img:visible").count() == CELLS - 1
        assert page.locator("td.difference .interval:visible").count() > CELLS
        for part in (".tools", ".export", "input[name=baseline]"):
            assert page.locator(f"{part}:visible").count() == 0


def test_prints_without_its_controls(desktop: Page) -> None:
    desktop.emulate_media(media="print")
    for part in (".tools", ".export", "input[name=baseline]"):
        assert desktop.locator(f"{part}:visible").count() == 0
    assert desktop.locator("tbody tr:visible").count() == CELLS
    desktop.set_viewport_size({"width": 1032, "height": 703})  # A4 on its side, within margins of 12 mm
    assert pages.nothing_is_cut_off(desktop)


def test_a_sweep_of_failures_is_still_a_page(tmp_path: Path, browser: Browser) -> None:
    rows = [{"name": f"cell {i}", "settings": {"steps": i}, "error": "no memory"} for i in range(3)]
    objectives = [{"key": "fid", "direction": "lower"}, {"key": "evaluations", "direction": "lower"}]
    path = write_report(_written(tmp_path, rows=rows, objectives=objectives))
    with pages.opened(browser, path, *pages.SIZES[1]) as page:
        assert page.get_by_text("3 of 3 rows ended with an error.").is_visible()
        page.get_by_role("button", name="Steps").click()
        assert _shown_names(page) == ["cell 0", "cell 1", "cell 2"]
    assert "failed: no memory" in export(tmp_path, "markdown")


@pytest.mark.parametrize(("kind", "taken"), [("PNG", True), ("JPEG", True), ("WEBP", True), ("GIF", False)])
def test_takes_the_picture_files_of_browsers(tmp_path: Path, browser: Browser, kind: str, taken: bool) -> None:
    Image.new("RGB", (60, 30), (200, 40, 40)).save(tmp_path / "picture", kind)
    _written(tmp_path, pictures=[{"image": "picture"}])
    if not taken:
        with pytest.raises(ValueError, match=r"pictures\[0\]\.image is \"picture\", not a PNG, JPEG or WebP picture"):
            write_report(tmp_path)
        return
    with pages.opened(browser, write_report(tmp_path), *pages.SIZES[0]) as page:
        assert page.evaluate("[...document.images].map((image) => [image.naturalWidth, image.height > 0])") == [
            [60, True]
        ]


# Exports


def _exported(page: Page, layout: str) -> str:
    page.locator(f"input[name=format][value={layout}]").check()
    return page.locator("textarea").input_value()


def _compare_csv(found: str, wanted: str) -> None:
    for one, other in zip(csv.reader(io.StringIO(found)), csv.reader(io.StringIO(wanted)), strict=True):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-9, abs=1e-12)


def test_the_page_exports_what_python_exports(desktop: Page, made: Path, tmp_path: Path) -> None:
    desktop.locator(".export > summary").click()
    _written(tmp_path, **json.loads((made / "results.json").read_text()))
    for picture in made.glob("*.jpg"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    results = json.loads((tmp_path / "results.json").read_text())
    for name in (None, "heun, 6 steps"):
        if name:
            desktop.get_by_label(f"Compare with {name}", exact=True).check()
            (tmp_path / "results.json").write_text(json.dumps(results | {"baseline": name}))
        for layout in ("markdown", "latex"):
            assert _exported(desktop, layout) == export(tmp_path, layout)
        _compare_csv(_exported(desktop, "csv"), export(tmp_path, "csv"))


def test_the_page_exports_the_rows_it_shows(desktop: Page, made: Path) -> None:
    desktop.locator(".export > summary").click()
    desktop.get_by_label("Solver").select_option(label="unipc")
    desktop.get_by_role("button", name="FD", exact=False).first.click()
    names = _shown_names(desktop)
    lines = _exported(desktop, "csv").splitlines()
    assert [next(csv.reader([line]))[0] for line in lines[1:]] == names
    assert set(lines) < set(export(made, "csv").splitlines()) or len(lines) == len(names) + 1
    with desktop.expect_download() as download:
        desktop.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "table.csv"
    assert Path(download.value.path()).read_text() == "\n".join(lines) + "\n"
    desktop.get_by_role("button", name="Copy").click()
    assert desktop.evaluate("getSelection().toString() || document.activeElement.value").strip() == "\n".join(lines)


def test_json_holds_every_number(made: Path) -> None:
    records = json.loads(export(made, "json"))
    rows = {row["name"]: row for row in _rows(made)}
    assert {record["name"] for record in records} == set(rows)
    for record in records:
        row = rows[record["name"]]
        assert record["fid"] == row.get("metrics", {}).get("fid", {}).get("value")
        assert record["solver"] == row["settings"]["solver"]
        assert (record["error"] is None) == ("error" not in row)
    base = next(record for record in records if record["fid_difference"] == 0)
    assert all(record["baseline"] == base["name"] for record in records)
    with pytest.raises(ValueError, match="no format 'xml'; choose one of markdown, csv, latex, json"):
        export(made, "xml")


NASTY = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)> '\"`&amp;",
    "<!--<script>",
    "=HYPERLINK(\"http://evil\")",
    "pipe | back\\slash \\| [x](javascript:alert(3)) *bold* `code`",
    "50% of $5 & #1 under_score {x} ~^",
    "line\none\r\n\ttwo\u2028three\x00\x1b",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "x" * 400,
    "\ud800 half a pair \U0001f600",
    "[first",
    "*first",
]  # fmt: skip


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A sweep whose every text is hostile."""
    Image.new("RGB", (60, 30)).save(tmp_path / "p.png")
    rows = _rows(_written(tmp_path))
    made = []
    for i, text in enumerate(NASTY):
        row = copy.deepcopy(rows[i % 3])
        row |= {"name": text, "note": text, "pairs": "</script>", "spec": {text: {text: [text]}}, "image": "p.png"}
        row["settings"] = {"solver": text, text: i, "steps": i}
        row["metrics"][f"fid/{NASTY[i % 2]}"] = row["metrics"]["fid"]
        made += [row, {"name": f"failed {text}", "error": text, "settings": {"solver": text}}]
    everything = "\n".join(NASTY)
    return _written(
        tmp_path,
        title=everything,
        summary=everything,
        rows=made,
        spec={everything: everything},
        pictures=[{"image": "p.png", "caption": everything}],
    )


@pytest.mark.parametrize("size", pages.SIZES, ids=pages.NAMES)
def test_hostile_texts_are_texts(nasty: Path, browser: Browser, size: tuple[int, int, str]) -> None:
    path = write_report(nasty)
    with pages.opened(browser, path, *size) as page:
        assert page.locator("script").count() == 2
        assert page.locator("img[onerror], [onload], a[href^=javascript]").count() == 0
        shown = _shown_names(page)
        for text in NASTY[:8]:
            assert re.sub(r"\r\n?", "\n", text).replace("\0", "") in shown
        assert pages.nothing_is_cut_off(page)
        page.locator("input[name=baseline]").nth(3).check()
        page.locator(".charts svg .point").first.hover(force=True)
        page.locator(".export > summary").click()
        for layout in ("markdown", "csv", "latex"):
            assert len(_exported(page, layout)) > 1000
        assert pages.nothing_is_cut_off(page)


def test_markdown_cells_stay_cells(nasty: Path) -> None:
    lines = export(nasty, "markdown").splitlines()
    assert len(lines) == 2 + 2 * len(NASTY)
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line) for line in lines]
    assert len({len(line) for line in cells}) == 1
    for line in lines[2:]:
        assert not re.search(r"(?<!\\)(?:\\\\)*[<`\[&]", line)  # neither tags, code, links nor entities


def test_csv_cells_stay_cells_and_are_no_formulas(nasty: Path) -> None:
    table = list(csv.reader(io.StringIO(export(nasty, "csv"))))
    assert len({len(line) for line in table}) == 1
    assert len(table) == 1 + 2 * len(NASTY)
    cells = [cell for line in table for cell in line]
    assert '\'=HYPERLINK("http://evil")' in cells
    for cell in cells:
        assert cell[:1] not in ("=", "@", "+")
        assert cell[:1] != "-" or math.isfinite(float(cell))


def test_latex_cells_stay_cells(nasty: Path) -> None:
    text = export(nasty, "latex")
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert len(body) == 2 * len(NASTY)
    count = {len(re.findall(r"(?<!\\)&", line)) for line in body}
    assert len(count) == 1
    assert len(text.split("{", 2)[2].split("}")[0]) == count.pop() + 1  # as many columns as are declared
    for line in body:
        assert line.endswith(r" \\")
        cell = line.removesuffix(r" \\").split(" & ")[0]
        left = re.sub(r"\\(?:text\w+\{\}|[{}$&#_%])|\{[\[*]\}", "", cell)
        assert not re.search(r"[\\{}$&#_%~^]", left), cell
        assert not line.startswith(("[", "*"))


# The command and its page of the documentation


def test_the_command_writes_the_page_and_prints_the_table(tmp_path: Path) -> None:
    _written(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0
    assert str(tmp_path / "report.html") in done.stdout.replace("\n", "")
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--table", "markdown"])
    assert done.stdout == export(tmp_path, "markdown")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "give the output folder of a finished job" in done.output


@pytest.mark.filterwarnings("ignore:a Frechet distance of")
def test_the_docs_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(compile(code, "docs/report.md", "exec"), {})
    results = read(tmp_path / "runs")
    assert report_paired.compared(results) == ["fid"]
    assert results.baseline == 2
    assert "How many steps" in (tmp_path / "runs" / "report.html").read_text()


def test_the_docs_show_what_the_benchmark_prints() -> None:
    (shown,) = re.findall(r"<!-- printed by `python benchmarks/report.py --table` -->\n((?:.*\n)*?)<!-- end -->", DOCS)
    command = [sys.executable, "benchmarks/report.py", "--table"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == shown
    rows = {row["cells"]: row for row in json.loads(BENCHMARK.with_suffix(".json").read_text())["rows"]}
    assert rows[100]["megabytes"] < 8
    assert rows[100]["open_ms"] < 2000
