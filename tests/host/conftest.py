"""Real ComfyUI servers on the CPU with the pack linked in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.tools.host import ComfyServer

API = Path(__file__).resolve().parent.parent / "api"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

# A file runs in one process. These take minutes, so they come first, and the others fill up what is left beside them.
LONG = ("test_teaching.py", "test_teaching_edits.py", "test_training.py", "test_workflows.py")

MakeServer = Callable[..., ComfyServer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in the order of LONG; the others as they were."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def make_server(comfy_dir: Path, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeServer]:
    """Start private servers, `make_server(args=[...], env={...}, base_dir=...)`, stopped with the session."""
    started: list[ComfyServer] = []

    def make(
        *, args: Sequence[str] = (), env: Mapping[str, str] | None = None, base_dir: Path | None = None
    ) -> ComfyServer:
        base = base_dir or tmp_path_factory.mktemp("comfy")
        # Nothing that the tests run may reach for the network.
        variables = {**OFFLINE, **(env or {})}
        server = ComfyServer(comfy_dir, base, pack_dir, args=["--cpu", *args], env=variables)
        server.start()
        started.append(server)
        return server

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server: MakeServer) -> ComfyServer:
    """The one server that the tests share; leave it idle, and its files as they were."""
    return make_server()


@pytest.fixture
def api_workflow() -> Callable[[str], dict[str, Any]]:
    """Load tests/api/<name>.json, afresh each time, so that a test may change it."""

    def load(name: str) -> dict[str, Any]:
        path = API / f"{name}.json"
        if not path.is_file():
            have = ", ".join(sorted(entry.stem for entry in API.glob("*.json")))
            raise FileNotFoundError(f"no workflow {name!r} in tests/api; there are: {have}")
        workflow: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return workflow

    return load
