"""The workflows that users drag in: complete, equal to their API twins, and kept in a saved picture."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import ui_workflow
from PIL import Image

from longcat_pack.tools.environment import PACK_NAME
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
REGISTRY_ID = "comfyui-longcat-image"
# A training of three steps goes the same way as a long one; what the base draws for preservation takes a minute.
SHORT = {"steps": 3, "validate_every": 0, "validation_steps": 1, "preservation_prompts": ""}
# Workflows that draw with what another one makes.
NEEDS = {"lora_use": "lora_train"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each workflow's name in turn."""
    return request.param


@pytest.fixture
def workflow(name: str) -> dict[str, Any]:
    """The workflow as the user interface reads it."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def other_server(make_server: Callable[..., ComfyServer]) -> ComfyServer:
    """A server that has drawn none of these pictures yet."""
    return make_server()


def saved_picture(server: ComfyServer, result: Result) -> Image.Image:
    """The one picture that a run saved."""
    (reference,) = (each for each in result.images if each["type"] == "output")
    return Image.open(io.BytesIO(server.view(reference)))


def halves(picture: Image.Image) -> list[np.ndarray]:
    """The left and the right half, in levels of 0..255 that can be subtracted."""
    return np.split(np.asarray(picture.convert("RGB")).astype(int), 2, axis=1)


def shortened(prompt: dict[str, Any]) -> dict[str, Any]:
    """A copy of a prompt whose trainings are short."""
    copy = json.loads(json.dumps(prompt))
    for node in copy.values():
        if node["class_type"] == "LongCatTrainLora":
            node["inputs"].update(SHORT)
    return copy


def prepare(server: ComfyServer, name: str, api_workflow: Callable[[str], dict[str, Any]]) -> None:
    """Run what has to be run before a workflow."""
    if name in NEEDS:
        server.run(shortened(api_workflow(NEEDS[name])))


def embedded_prompt(picture: Image.Image) -> dict[str, Any]:
    """The prompt in a saved picture, without the fingerprints that ComfyUI notes in it."""
    nodes = json.loads(picture.info["prompt"]).items()
    return {key: {name: node[name] for name in node if name != "is_changed"} for key, node in nodes}


def test_every_workflow_has_a_thumbnail_beside_it(name: str) -> None:
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert thumbnail.format == "JPEG"
        assert min(thumbnail.size) >= 256


def test_the_template_browser_offers_every_workflow(server: ComfyServer) -> None:
    offered = json.loads(server.get("/workflow_templates"))[PACK_NAME]
    assert sorted(offered) == NAMES
    for name in NAMES:
        for ending in ("json", "jpg"):
            served = server.get(f"/api/workflow_templates/{PACK_NAME}/{quote(name)}.{ending}")
            assert served == (FOLDER / f"{name}.{ending}").read_bytes()


def test_every_node_names_the_pack_that_has_it(workflow: dict[str, Any], server: ComfyServer) -> None:
    schemas = server.object_info()
    for node in workflow["nodes"]:
        ours = schemas.get(node["type"], {}).get("python_module", "").endswith(PACK_NAME)
        properties = node["properties"]
        assert properties["cnr_id"] == (REGISTRY_ID if ours else "comfy-core"), node
        assert properties["ver"], node


def test_there_is_a_note_in_both_languages(workflow: dict[str, Any]) -> None:
    (text,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert "With the official model, change:" in text
    assert "使用官方模型时请修改：" in text


def test_the_links_agree_with_the_slots(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out, target, into, kind in workflow["links"]:
        outgoing, incoming = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert number in outgoing["links"] and incoming["link"] == number
        assert outgoing["type"] == incoming["type"] == kind
    numbers = [link[0] for link in workflow["links"]]
    assert len(set(numbers)) == len(numbers)
    assert workflow["last_link_id"] == max(numbers)
    assert workflow["last_node_id"] == max(nodes)


def test_it_is_its_api_twin(
    name: str, workflow: dict[str, Any], server: ComfyServer, api_workflow: Callable[[str], dict[str, Any]]
) -> None:
    assert ui_workflow.to_api(workflow, server.object_info()) == api_workflow(name)


def test_dragging_the_saved_picture_in_gives_the_same_picture(
    name: str,
    workflow: dict[str, Any],
    server: ComfyServer,
    other_server: ComfyServer,
    api_workflow: Callable[[str], dict[str, Any]],
) -> None:
    prepare(server, name, api_workflow)
    extra = {"extra_pnginfo": {"workflow": workflow}}
    first = saved_picture(server, server.run(shortened(api_workflow(name)), extra_data=extra))

    embedded = json.loads(first.info["workflow"])
    assert embedded == workflow
    prompt = ui_workflow.to_api(embedded, other_server.object_info())
    assert prompt == api_workflow(name)
    assert shortened(prompt) == embedded_prompt(first)

    prepare(other_server, name, api_workflow)
    again = other_server.run(shortened(prompt))
    samplers = {key for key, node in prompt.items() if "seed" in node["inputs"]}
    assert samplers and samplers <= set(again.executed_nodes)
    np.testing.assert_array_equal(np.asarray(saved_picture(other_server, again)), np.asarray(first))


def test_lora_use_shows_the_same_picture_by_both_loaders(
    server: ComfyServer, api_workflow: Callable[[str], dict[str, Any]]
) -> None:
    """Ours on the left, core's on the right; and without the LoRA it is another picture."""
    prepare(server, "lora_use", api_workflow)
    prompt = api_workflow("lora_use")
    ours, cores = halves(saved_picture(server, server.run(prompt)))
    assert abs(ours - cores).max() <= 1
    prompt["2"]["inputs"]["strength"] = 0.0
    base, again = halves(saved_picture(server, server.run(prompt)))
    np.testing.assert_array_equal(again, cores)
    assert abs(base - cores).max() > 4


def test_the_saved_picture_tells_nothing_about_the_machine(
    server: ComfyServer, api_workflow: Callable[[str], dict[str, Any]], pack_dir: Path
) -> None:
    picture = saved_picture(server, server.run(api_workflow("text_to_image")))
    for folder in (pack_dir, server.base_dir, server.comfy_dir, Path.home()):
        assert str(folder) not in picture.info["prompt"]
