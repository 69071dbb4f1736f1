"""The Chromium of this machine, and pages in it that must cause no fault."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}


@contextmanager
def run_chromium() -> Iterator[Any]:
    """The browser, driven by playwright; the test is skipped where either is missing."""
    driver = pytest.importorskip("playwright.sync_api", reason="there is no playwright to drive a browser with")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open the page in")
    with driver.sync_playwright() as driving:
        made = driving.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@contextmanager
def open_page(browser: Any, is_own: Callable[[str], bool]) -> Iterator[Any]:
    """A page that must write nothing to the console, open no dialog, and ask for nothing but its own addresses."""
    made, faults = browser.new_page(viewport=DESK), []
    made.set_default_timeout(20_000)
    made.on("console", lambda message: faults.append(message.text))
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on("dialog", lambda dialog: faults.append(dialog.message))
    made.on("request", lambda sent: None if is_own(sent.url) else faults.append(sent.url))
    yield made
    made.close()
    assert not faults


def wait_until(page: Any, expression: str, arg: Any = None, seconds: float = 20) -> None:
    """Wait until a JavaScript expression is true.

    It is asked for from outside, again and again: the driver's own waiting evaluates text inside of the page, which the
    page's policy forbids, once it is not true at first.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
        page.wait_for_timeout(20)
