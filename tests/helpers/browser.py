"""A headless Chromium, as the system has it, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking",
    "--no-first-run",
)  # fmt: skip


@contextmanager
def browser_page(address: str | Path, width: int = 1000, height: int = 700) -> Iterator[tuple[Any, list[str]]]:
    """A page that shows `address`, and what goes wrong on it: errors, warnings, and requests for anything but the file itself."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(NAMES)}: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    address = address.as_uri() if isinstance(address, Path) else address
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}") if message.type != "log" else None)
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            page.on("request", lambda request: wrong.append(f"request: {request.url[:200]}") if _foreign(request.url, address) else None)
            page.goto(address)
            yield page, wrong
        finally:
            browser.close()


def _foreign(url: str, address: str) -> bool:
    return not url.startswith("data:") and url.split("#")[0] != address
