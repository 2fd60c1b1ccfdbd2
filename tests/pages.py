"""Pages in headless Chromium, which must neither complain nor ask for anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

SIZES = [(1280, 900, "light"), (390, 844, "dark")]
NAMES = ["desktop", "phone"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium: the one on the path, or the one playwright has installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip(
                "no Chromium: install one (Debian: apt-get install chromium), or run `playwright install chromium`"
            )
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int, height: int, scheme: str, scripts: bool = True) -> Iterator[Page]:
    """A page, opened; complaints and requests fail the test that opened it."""
    context = browser.new_context(
        viewport=ViewportSize(width=width, height=height),
        color_scheme="dark" if scheme == "dark" else "light",
        java_script_enabled=scripts,
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    own = ("data:", "blob:", path.as_uri())
    page.on("request", lambda sent: complaints.append(sent.url) if not sent.url.startswith(own) else None)
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not complaints


def nothing_is_cut_off(page: Page) -> bool:
    """Whether the page fits the window, and so does every cell that does not stand in a scrolled box."""
    fits: bool = page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && "
        "[...document.querySelectorAll('td')].every((cell) => getComputedStyle(cell.closest('.scroll')).overflowX === 'auto'"
        " || cell.getBoundingClientRect().right <= innerWidth)"
    )
    return fits
