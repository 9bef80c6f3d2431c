"""One headless Chromium for all tests of the report's page; pages that tell what went wrong in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lexplain.report.contents import Report
from lexplain.report.rendering import render

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

OpenReport = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(CHROMIUM)} is on the PATH. The report would not have been looked at by any browser. Install "
            "one (Debian: apt install chromium), or name it: CHROMIUM=/path/to/browser make test-browser"
        )
    with sync_playwright() as playwright:
        # As root, as in a container, Chromium starts without its sandbox only; the pages are our own.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=found, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def open_report(browser: Browser, tmp_path: Path) -> Iterator[OpenReport]:
    """Opens a report, or its HTML, from disk; at the end nothing may have been asked of a network, refused or raised."""
    contexts, complaints = [], []

    def open_(report: Report | str, **options: Any) -> Page:
        path = tmp_path / f"report-{len(contexts)}.html"
        path.write_text(report if isinstance(report, str) else render(report), encoding="utf-8")
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached", timeout=20_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
