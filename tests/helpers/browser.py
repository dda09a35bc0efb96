"""Debian's chromium, headless, for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def browser(folder: Path, width: int = 1200, height: int = 900) -> Iterator[Any]:
    """A browser, as selenium's driver; skips the test where there is none (see tests/report/install.sh).

    Args:
        folder: for what it writes; made if missing.
        width: of its window, in pixels.
        height: likewise.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with its driver here: bash tests/report/install.sh")
    folder.mkdir(exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "no-proxy-server",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.add_argument(f"--window-size={width},{height}")
    environment = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER, env=environment))
    try:
        yield driver
    finally:
        driver.quit()


def set_theme(driver: Any, theme: str) -> None:
    """Lets pages believe that the reader prefers a `light` or `dark` theme."""
    feature = {"name": "prefers-color-scheme", "value": theme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def set_width(driver: Any, width: int, height: int = 900) -> None:
    """Gives the page a screen of this many pixels; a window cannot be as narrow as a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def console(driver: Any) -> list[str]:
    """What the page has complained of since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]
