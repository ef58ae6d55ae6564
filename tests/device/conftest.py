"""Real ComfyUI servers on a CUDA device. Without one the tier says so and is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from device import machine

from host.graphs import Graph, changed
from longcat_pack.tools.host import ComfyServer

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
SETTINGS = {"5.steps": 8, "1.engine.precision": "fp32", "1.text_encoder_precision": "fp32"}

Servers = Callable[..., ComfyServer]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave this folder's tests out where they cannot run."""
    return True if machine.missing() and collection_path.name.startswith("test_") else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why the tier did not run."""
    reason = machine.missing()
    if reason:
        terminalreporter.write_line(f"device tier: not run, {reason}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the servers compute."""
    return machine.device()


@pytest.fixture(scope="session")
def make_server(comfy_dir: Path, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Start a server with flags of main.py: ``make_server("--lowvram", base_dir=...)``; it ends with the session."""
    started: list[ComfyServer] = []

    def make(*flags: str, base_dir: Path | None = None, env: Mapping[str, str] | None = None) -> ComfyServer:
        args = machine.DRY_FLAGS.split() if machine.DRY_FLAGS else flags
        base, variables = base_dir or tmp_path_factory.mktemp("comfy"), {**OFFLINE, **(env or {})}
        server = ComfyServer(comfy_dir, base, pack_dir, args=args, env=variables)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server_with(make_server: Servers) -> Servers:
    """The one server with those flags that the tests share."""
    running: dict[tuple[str, ...], ComfyServer] = {}

    def shared(*flags: str) -> ComfyServer:
        if flags not in running:
            running[flags] = make_server(*flags)
        return running[flags]

    return shared


@pytest.fixture
def graph() -> Graph:
    """Text to image in fp32 and in fewer steps than the workflow's."""
    path = Path(__file__).resolve().parent.parent / "api" / "text_to_image.json"
    return changed(json.loads(path.read_text(encoding="utf-8")), **SETTINGS)
