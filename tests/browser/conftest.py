"""ComfyUI's own frontend in a headless Chromium. Without a browser the tier says so and is left out."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.tools.host import ComfyServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No sandbox: a container's root has none. The rest keeps Chromium from calling its maker.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
VIEWPORT = {"width": 1600, "height": 900}
# It opens with a graph of its own, which would take the place of one that is loaded before.
FRONTEND_IS_UP = "window.app?.extensionManager && window.app.graph?.nodes.length > 0"


def missing() -> str | None:
    """What this tier needs and the machine lacks, None when all is there."""
    if importlib.util.find_spec("playwright") is None:
        return "the package playwright is not installed"
    if browser_path() is None:
        return f"there is none of {', '.join(BROWSERS)} on the path"
    return None


def browser_path() -> str | None:
    """The first Chromium on the path."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave this folder's tests out where they cannot run."""
    return True if missing() and collection_path.name.startswith("test_") else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why the tier did not run."""
    reason = missing()
    if reason:
        terminalreporter.write_line(f"browser tier: not run, {reason}")


@pytest.fixture(scope="session")
def server(comfy_dir: Path, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI on the CPU whose frontend opens without its welcome page."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    base = tmp_path_factory.mktemp("comfy")
    with ComfyServer(comfy_dir, base, pack_dir, args=["--cpu"], env=offline) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; while it is open, playwright keeps an event loop running in this thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(params=["en", "zh"])
def language(request: pytest.FixtureRequest) -> str:
    """The language that the frontend is set to."""
    return request.param


@pytest.fixture
def page(browser: Any, server: ComfyServer, language: str) -> Iterator[Any]:
    """The frontend in a fresh browser context, with the node texts in `language`; other hosts are cut off."""
    settings = server.base_dir / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(f'{{"Comfy.TutorialCompleted": true, "Comfy.Locale": "{language}"}}', encoding="utf-8")
    context = browser.new_context(viewport=VIEWPORT, locale="en-US")
    ours = (server.url, "data:", "blob:")
    context.route(
        "**/*",
        lambda route: route.continue_() if route.request.url.startswith(ours) else route.abort(),
    )
    tab = context.new_page()
    tab.goto(server.url)
    tab.wait_for_function(FRONTEND_IS_UP, timeout=120_000)
    tab.wait_for_function("Object.keys(LiteGraph.registered_node_types).includes('LongCatLoader')")
    yield tab
    context.close()
