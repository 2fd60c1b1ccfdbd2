"""The report: what it draws, that it is one file, and that it works in a browser."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page

from flowkit.eval import chart
from flowkit.eval.report import write_report

from . import pages

RESULTS: dict[str, Any] = {
    "title": "A <b>title</b> & more",
    "summary": "Two samplers.",
    "spec": {"seed": 0, "versions": {"flowkit": "0.1.0"}, "grid": [1, 0.5, 0], "scheduler": {f"option_{i}": i for i in range(13)}},
    "rows": [
        {
            "name": "stock",
            "steps": 4,
            "evaluations": 4,
            "metrics": {"fid": {"value": 0.721, "se": 0.021}, "recall": {"value": 0.5}},
            "seconds": 1.25,
            "image": "one.png",
            "note": "the last step moves nothing",
        },
        {"name": "student", "steps": 1, "evaluations": 1, "metrics": {"fid": {"value": 0.318, "se": 0.013}}, "seconds": 125},
        {"name": '<script>alert("x")</script>\'" onload=alert(1)', "evaluations": 16, "metrics": {"fid": {"value": 0.237}}},
        {"name": "unknown", "steps": None, "metrics": {"fid": {"value": math.nan}}, "image": None},
    ],
    "pictures": [{"image": "one.png", "caption": "The same seeds."}],
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The folder of a finished job."""
    Image.new("RGB", (60, 30), (200, 40, 40)).save(tmp_path / "one.png")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


class _Links(HTMLParser):
    """Collects what a page points to and the tags it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def _parsed(html: str) -> _Links:
    links = _Links()
    links.feed(html)
    return links


def test_is_one_file(job: Path) -> None:
    path = write_report(job)
    assert path == job / "report.html"
    html = path.read_text()
    assert not re.search(r"https?://|@import|url\(", html)
    targets = _parsed(html).targets
    assert sum(target.startswith("data:") for target in targets) == 3  # icon, picture, sample
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert sorted(file.name for file in job.iterdir()) == ["one.png", "report.html", "results.json"]


def test_escapes_what_it_is_given(job: Path) -> None:
    html = write_report(job).read_text()
    assert _parsed(html).tags.count("script") == 2  # data and script
    assert 'alert("x")' not in html
    assert "onload=alert(1)" in html  # as text ...
    assert not re.search(r"<[^>]*\sonload=alert", html)  # ... in no tag
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in html


def test_numbers_have_the_digits_their_error_supports(job: Path) -> None:
    text = re.sub(r"<[^>]+>", "", write_report(job).read_text()).replace("\N{NO-BREAK SPACE}", " ")
    for shown in ("0.721 ± 0.021", "0.318 ± 0.013", "0.2370", "1.2 s", "2 min 05 s", "0.5000", "–"):  # noqa: RUF001
        assert shown in text


def test_an_old_report_is_replaced_only_by_a_complete_one(job: Path) -> None:
    before = write_report(job).read_bytes()
    (job / "one.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\[0\]\.image 'one\.png'"):
        write_report(job)
    assert (job / "report.html").read_bytes() == before


def _changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    results = copy.deepcopy(RESULTS)
    owner: Any = results
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows",), [], "has no rows"),
        (("rows",), {"a": 1}, r'rows is {"a": 1}, not a list of objects'),
        (("title",), None, "title is null, not a string"),
        (("rows", 1, "name"), 7, r"rows\[1\]\.name is 7, not a string"),
        (("rows", 1, "steps"), "four", r'rows\[1\]\.steps is "four", not a number'),
        (("rows", 1, "evaluations"), True, r"rows\[1\]\.evaluations is true, not a number"),
        (("rows", 1, "metrics"), 0.3, r"rows\[1\]\.metrics is 0\.3, not an object"),
        (("rows", 1, "metrics", "fid"), 0.3, r"rows\[1\]\.metrics\.fid is 0\.3, not an object"),
        (("rows", 1, "metrics", "fid", "value"), "low", r'rows\[1\]\.metrics\.fid\.value is "low", not a number'),
        (("rows", 1, "image"), "../one.png", r'rows\[1\]\.image is "\.\./one\.png", not a file inside'),
        (("rows", 1, "image"), "results.json", r'rows\[1\]\.image is "results\.json", not a PNG, JPEG or WebP picture'),
        (("pictures", 0, "caption"), [], r"pictures\[0\]\.caption is \[\], not a string"),
        (("spec",), "s" * 99, r'spec is "s{58}…, not an object'),
    ],
)
def test_says_what_is_wrong_and_where(job: Path, path: tuple[str | int, ...], value: object, message: str) -> None:
    (job / "results.json").write_text(json.dumps(_changed(path, value)))
    with pytest.raises(ValueError, match=message):
        write_report(job)
    assert not (job / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b'{"title": ', b"[1]", b"\xff\xfe"])
def test_refuses_a_broken_file(job: Path, content: bytes) -> None:
    (job / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        write_report(job)


def test_refuses_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no results\.json in .*: give the output folder"):
        write_report(tmp_path)


def test_names_the_missing_extra(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape('pip install "flowkit-diffusion[report]"')):
        write_report(job)


_positive = st.floats(1e-6, 1e6)
_rows = st.lists(st.tuples(st.integers(1, 4000), _positive, st.none() | _positive), min_size=1, max_size=60)


@given(_rows, st.booleans())
def test_charts_stay_inside_and_keep_order(rows: list[tuple[int, float, float | None]], lower: bool) -> None:
    drawn = chart.chart([chart.Measured(i, "", *row) for i, row in enumerate(rows)], lower)
    assert len(drawn.points) == len(rows)
    for point in drawn.points:
        ends = (point.y, *(point.bar or ()))
        assert all(chart.TOP <= y <= chart.BOTTOM for y in ends)
        assert chart.LEFT <= point.x <= chart.RIGHT
    heights = [point.y for point in sorted(drawn.points, key=lambda p: p.row.value)]
    assert heights == sorted(heights, reverse=True)
    assert len(drawn.y_ticks) >= 2
    # The frontier, from its definition: nobody with at most as many evaluations has a better value, or the same one cheaper.
    for point in drawn.points:
        rivals = [r for r in rows if r[0] <= point.row.cost]
        best = min(r[1] for r in rivals) if lower else max(r[1] for r in rivals)
        cheapest = min(r[0] for r in rivals if r[1] == best)
        assert point.best == ((point.row.cost, point.row.value) == (cheapest, best))


def test_a_value_below_zero_makes_the_axis_linear() -> None:
    drawn = chart.chart([chart.Measured(1, "", 1, -0.25, 0.1), chart.Measured(2, "", 2, 0.75, None)], True)
    assert drawn.linear == "vertical"
    at = {tick.label: tick.at for tick in drawn.y_ticks}
    unit = (at["0"] - at["0.4"]) / 0.4
    y = {point.row.number: point.y for point in drawn.points}
    assert (y[1], y[2]) == pytest.approx((at["0"] + 0.25 * unit, at["0"] - 0.75 * unit), abs=0.05)


def test_numbered_points_do_not_cover_each_other() -> None:
    drawn = chart.chart(
        [chart.Measured(i, "", 4, 1.0 + i % 2 * 1e-3, None) for i in range(4)] + [chart.Measured(5, "", 1, 9.0, None)],
        True,
    )
    places = [(point.x, point.y) for point in drawn.points]
    distances = [math.dist(a, b) for i, a in enumerate(places) for b in places[:i]]
    assert min(distances) >= 2 * chart.BADGE


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with pages.chromium() as browser:
        yield browser


@pytest.fixture(params=pages.SIZES, ids=pages.NAMES)
def page(request: pytest.FixtureRequest, browser: Browser, job: Path) -> Iterator[Page]:
    """The report, opened."""
    with pages.opened(browser, write_report(job), *request.param) as page:
        yield page


def _names(page: Page) -> list[str]:
    return page.locator("tbody tr:not([hidden]) .name").all_text_contents()


def test_opens_in_a_browser(page: Page) -> None:
    assert page.title() == "A <b>title</b> & more"
    assert page.locator("tbody tr").count() == len(RESULTS["rows"])
    assert page.locator("svg .point").count() == 3  # recall has one value only, and nothing to compare it with
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 60)")
    assert page.locator("img").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('td')].every((cell) => cell.getBoundingClientRect().right <= innerWidth)"
    )


def test_follows_the_colour_scheme(page: Page) -> None:
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    red = int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    assert (red < 64) == dark


def test_sorts_with_missing_values_last(page: Page) -> None:
    hostile = RESULTS["rows"][2]["name"]
    assert _names(page) == ["stock", "student", hostile, "unknown"]
    heading = page.get_by_role("button", name="FD")
    heading.click()
    assert _names(page) == [hostile, "student", "stock", "unknown"]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("FD")
    heading.click()
    assert _names(page) == ["stock", "student", hostile, "unknown"]
    page.get_by_role("button", name="Steps").click()
    assert _names(page) == ["student", "stock", hostile, "unknown"]
    page.get_by_role("button", name="Method").click()
    assert _names(page) == ["stock", "student", hostile, "unknown"]


def test_pointing_at_a_row_marks_its_point(page: Page) -> None:
    page.locator("tbody tr").nth(1).hover()
    assert page.locator("svg .point.on").get_attribute("aria-label") == "student: FD 0.318 ± 0.013 at 1 evaluation"


def test_provenance_unfolds_in_steps(page: Page) -> None:
    entry, deeper = page.get_by_text("versions.flowkit"), page.get_by_text("option_12")
    assert not entry.is_visible()
    page.get_by_text("How to repeat this").click()
    assert entry.is_visible()
    assert page.get_by_text("[1, 0.5, 0]").is_visible()
    assert not deeper.is_visible()
    page.get_by_text("scheduler", exact=True).click()
    assert deeper.is_visible()
