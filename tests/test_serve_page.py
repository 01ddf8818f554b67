"""The page in a real browser: a prompt is typed, its picture comes, another is cancelled; small, dark, by keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan
from fake_gang import LIMIT_S
from serving import Served, served

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium with its driver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def live(flux2_dir: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, served(make_plan(RunConfig(), flux2_dir, "cpu"), patch) as found:
        yield found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(LIMIT_S)
    yield driver
    driver.quit()


def _until(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, LIMIT_S).until(lambda _: browser.execute_script(f"return {script}"))


def _shot(browser: Any, name: str) -> None:
    """For whoever wants to look."""
    if folder := os.environ.get("CROSSDOCK_SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/{name}.png")


def _type(browser: Any, text: str) -> None:
    """As somebody without a mouse: the prompt has the focus; Tab leads to the button."""
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(text)
    for _ in range(20):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element.get_attribute("type") == "submit":
            break
    browser.switch_to.active_element.send_keys(Keys.ENTER)


def test_a_prompt_a_picture_a_cancel_and_a_reload(live: Served, browser: Any) -> None:
    browser.set_window_size(1200, 800)
    browser.get(live.url)
    _until(browser, "document.getElementById('name').textContent == 'fox-1'")
    _until(browser, "document.getElementById('state').textContent.startsWith('ready')")
    _type(browser, "a fox")
    _until(browser, "document.querySelectorAll('#pictures img').length == 1")
    size = (
        "[document.querySelector('#pictures img').naturalWidth, document.querySelector('#pictures img').naturalHeight]"
    )
    assert _until(browser, size) == [32, 32]
    assert _until(browser, "document.querySelectorAll('#ranks tr').length") == 1
    seed = _until(browser, "document.querySelector('#pictures figcaption').textContent.match(/seed (\\d+)/)[1]")
    browser.find_element("css selector", "#pictures button").click()  # again with this seed
    assert browser.find_element("id", "seed").get_attribute("value") == seed
    assert browser.find_element("id", "prompt").get_attribute("value") == "a fox"
    _shot(browser, "picture")

    live.gang.gate.clear()
    browser.find_element("css selector", "button.main").click()
    cancel = _until(browser, "document.querySelector('#works button')")
    live.eventually(lambda: live.scheduler.running)
    _shot(browser, "progress")
    cancel.click()
    live.eventually(lambda: live.gang.told)
    live.gang.gate.set()
    _until(browser, "document.querySelectorAll('#works figure').length == 0")
    live.eventually(lambda: not live.scheduler.running)
    assert browser.find_element("id", "error").text == ""

    browser.refresh()
    _until(browser, "document.getElementById('name').textContent == 'fox-1'")
    assert [row for row in browser.get_log("browser") if row["level"] in ("SEVERE", "WARNING")] == []


def test_small_and_dark(live: Served, browser: Any) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(live.url)
    _until(browser, "document.getElementById('name').textContent == 'fox-1'")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), "it is too wide"
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    _shot(browser, "phone")


def test_what_is_refused_is_said(live: Served, browser: Any) -> None:
    browser.get(live.url)
    _until(browser, "document.getElementById('name').textContent == 'fox-1'")
    browser.find_element("id", "size").send_keys("4096x4096")
    browser.find_element("id", "prompt").click()
    _type(browser, "a fox")
    assert "at most" in _until(browser, "document.getElementById('error').textContent")
