"""A real Chromium for the page tests."""

import contextlib
import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@contextlib.contextmanager
def chromium():
    """The system's Chromium, started; a machine without one skips, CI fails."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no Chromium: install the system's package")
        pytest.skip("no Chromium on this machine; install the system's package to test the pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield running
        running.close()


@contextlib.contextmanager
def watched(browser, file):
    """A function (width, scheme) -> the page of a file, drawn; in the end no error and no request beyond the file was seen."""
    troubles, pages = [], []
    local = lambda url: url.startswith("data:") or url.partition("#")[0] == f"file://{file}"

    def open_page(width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url) if not local(request.url) else None)
        page.goto(f"file://{file}")
        page.wait_for_selector("body[data-drawn=yes]", timeout=60_000)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert troubles == []


def cut_on_paper(page):
    """How many charts and tables reach beyond what holds them, where the page is printed."""
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})  # an A4 page between its margins
    return page.evaluate(
        """[...document.querySelectorAll('.chart svg.marks, .scroll > table')].filter(each =>
        each.getBoundingClientRect().right > each.parentElement.getBoundingClientRect().right + 1).length"""
    )


def luminance(page):
    """The sum of the ground's red, green and blue."""
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part.strip("rgba() ")) for part in ground.split(",")[:3])
