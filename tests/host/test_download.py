"""Through the real server: a missing checkpoint is downloaded where a run asks for it, and only there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import checkpoints_broken as broken
import pytest
from hub_server import COMMIT, Hub, read_folder

from host.bad_input import failed, pixels, prompt, rejected
from host.conftest import MakeServer
from host.graphs import Graph
from longcat_pack.longcat_backend.flavours import FLAVOURS
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Event, Interrupted

NAME = "LongCat-Image"
REPO = f"meituan-longcat/{NAME}"
COMMAND = f"hf download {REPO} --local-dir"
BIG = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(pack_dir: Path) -> dict[str, bytes]:
    """LongCat-Tiny's files."""
    return read_folder(pack_dir / "demo" / "LongCat-Tiny")


@pytest.fixture(scope="module")
def shared_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(REPO, files) as hub:
        yield hub


@pytest.fixture
def hub(shared_hub: Hub, files: dict[str, bytes]) -> Hub:
    """The hub, as new."""
    shared_hub.reset(files)
    return shared_hub


@pytest.fixture(scope="module")
def online_server(make_server: MakeServer, shared_hub: Hub) -> ComfyServer:
    """A server that may reach the local hub, and knows no other."""
    return make_server(env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": shared_hub.url})


@pytest.fixture
def online(online_server: ComfyServer) -> Iterator[ComfyServer]:
    """That server without a checkpoint in its models/longcat_image, before and afterwards."""
    yield online_server
    empty(online_server)


def models(server: ComfyServer) -> Path:
    return server.base_dir / "models" / "longcat_image"


def empty(server: ComfyServer) -> None:
    for entry in models(server).iterdir() if models(server).is_dir() else ():
        broken.remove(entry)


def asking(**inputs: object) -> Graph:
    """A prompt with the missing checkpoint that asks for the download."""
    return prompt(NAME, **{"1.download_missing": True, **inputs})


def test_the_official_names_are_offered_after_what_is_there(online: ComfyServer) -> None:
    inputs = online.object_info("LongCatLoader")["LongCatLoader"]["input"]
    names = inputs["required"]["checkpoint"][1]["options"]
    official = [flavour.repo_id.split("/")[1] for flavour in FLAVOURS.values()]
    assert names[-len(official) :] == official and "LongCat-Tiny" in names[: -len(official)]
    assert inputs["optional"]["download_missing"][1]["default"] is False


def test_nothing_is_downloaded_unasked(online: ComfyServer, hub: Hub) -> None:
    folder = models(online) / NAME
    words = (NAME, "download_missing", "29 GB", f'{COMMAND} "{folder}"')
    rejected(online, prompt(NAME), "1", words)
    rejected(online, prompt(NAME, **{"1.download_missing": False}), "1", words)
    assert hub.requests == 0 and not folder.exists()


def test_a_missing_checkpoint_is_downloaded_and_draws(online: ComfyServer, hub: Hub, files: dict[str, bytes]) -> None:
    graph = asking(**{"5.seed": 3})
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 3]}}
    result = online.run(graph)
    own = pixels(online, online.run(prompt(**{"5.seed": 3})))
    assert (pixels(online, result) == own).all()
    assert {path.relative_to(models(online) / NAME).as_posix() for path in (models(online) / NAME).rglob("*.*")} >= {
        path for path in files if path != "README.md"
    }
    assert f"{REPO}@{COMMIT}" in result.outputs["report"]["text"][0]
    size = f"{sum(map(len, (files[path] for path in set(hub.sent)))) / 1e9:.2f} GB"
    told = [event.data["text"] for event in result.events if event.type == "progress_text"]
    assert f"{REPO}: 0.01 / {size}" in told
    shown = [
        event.data["nodes"].get("1", {}).get("value", 0) for event in result.events if event.type == "progress_state"
    ]
    assert max(shown) == sum(hub.sent.values())
    before = hub.requests
    assert online.run(asking()).images
    assert online.run(prompt(NAME)).images
    assert hub.requests == before


def test_an_interrupted_download_goes_on(online: ComfyServer, hub: Hub, files: dict[str, bytes]) -> None:
    hub.cuts[BIG] = [900_000]
    hub.stall_at = sum(len(content) for content in files.values()) // 2
    prompt_id = online.queue(asking())

    def interrupt(event: Event) -> None:
        if hub.stall_at is not None and hub.stalled.wait(60):
            online.interrupt(prompt_id)
            hub.release()

    with pytest.raises(Interrupted):
        online.wait(prompt_id, on_event=interrupt)
    assert not (models(online) / NAME / "model_index.json").exists()
    assert online.run(asking()).images
    first, second, third = [start for path, start in hub.asked if path == BIG]
    assert (first, second) == (None, "bytes=900000-")  # the cut, which the run survived
    assert third is not None and int(third.removeprefix("bytes=").rstrip("-")) >= 900_000


def test_a_changed_file_is_refused_and_the_server_goes_on(online: ComfyServer, hub: Hub) -> None:
    good = hub.files[BIG]
    hub.files[BIG] = good[:-1] + bytes([good[-1] ^ 1])
    failed(online, asking(), "1", (NAME, BIG, "hash", COMMAND))
    rejected(online, prompt(NAME), "1", (COMMAND,))
    hub.files[BIG] = good
    assert online.run(asking()).images


def test_without_the_network_the_command_is_told(server: ComfyServer) -> None:
    failed(server, asking(), "1", (NAME, "HF_HUB_OFFLINE", COMMAND))
    empty(server)


def test_another_missing_name_is_not_downloaded(online: ComfyServer, hub: Hub) -> None:
    for name in ("NoSuchFolder", "meituan-longcat/LongCat-Image", "longcat-image"):
        rejected(online, prompt(name, **{"1.download_missing": True}), "1", ("no checkpoint folder", name))
    assert hub.requests == 0


def test_the_workflows_leave_it_off(pack_dir: Path) -> None:
    for path in (pack_dir / "tests" / "api").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            assert node["class_type"] != "LongCatLoader" or node["inputs"]["download_missing"] is False, path
