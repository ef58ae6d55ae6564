"""What the user interface itself makes of the workflows, of a saved picture and of the translations."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.tools.host import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
KEPT = ("id", "type", "pos", "flags", "order", "mode", "title", "properties", "widgets_values", "color", "bgcolor")

# JSON and back leaves out what is undefined, as saving does.
SERIALISED = "JSON.parse(JSON.stringify(await window.app.graphToPrompt()))"
LOAD = (
    f"async ([workflow, name]) => {{ await window.app.loadGraphData(workflow, true, true, name); return {SERIALISED} }}"
)
DROP = f"""async (encoded) => {{
    const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0))
    await window.app.handleFile(new File([bytes], 'saved.png', {{ type: 'image/png' }}))
    return {SERIALISED}
}}"""
LABELS = """() => Object.fromEntries(window.app.graph.nodes.map((node) =>
    [node.id, Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.label ?? widget.name]))]))"""


def picture(name: str) -> dict[str, Any]:
    """A prompt that saves any picture; what the workflows themselves draw is the host tests' business."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"dropped-{name}"}},
    }


def read(path: str) -> dict[str, Any]:
    """A JSON file of the repository."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each workflow's name in turn."""
    return request.param


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt without what depends on the language."""
    return {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in prompt.items()}


def assert_kept(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Nothing of a workflow was lost or changed on the way through the frontend."""
    for part in ("id", "last_node_id", "last_link_id", "links", "groups", "version"):
        assert after[part] == before[part], part
    nodes = {node["id"]: node for node in after["nodes"]}
    assert set(nodes) == {node["id"] for node in before["nodes"]}
    for node in before["nodes"]:
        found = nodes[node["id"]]
        assert {key: found.get(key) for key in KEPT} == {key: node.get(key) for key in KEPT}
        for side in ("inputs", "outputs"):
            slots = [{key: slot[key] for key in slot if key != "localized_name"} for slot in found[side]]
            assert slots == node[side], (node["id"], side)


def test_a_workflow_is_its_api_twin_and_stays_as_it_is(page: Any, name: str, language: str) -> None:
    workflow, twin = read(f"workflows/{name}.json"), read(f"tests/api/{name}.json")
    made = page.evaluate(LOAD, [workflow, name])
    assert without_titles(made["output"]) == without_titles(twin)
    if language == "en":
        assert made["output"] == twin
    assert_kept(made["workflow"], workflow)


def test_dropping_a_saved_picture_in_brings_its_workflow_back(page: Any, name: str, server: ComfyServer) -> None:
    workflow, twin = read(f"workflows/{name}.json"), read(f"tests/api/{name}.json")
    result = server.run(picture(name), extra_data={"extra_pnginfo": {"workflow": workflow}})
    (reference,) = result.images
    made = page.evaluate(DROP, base64.b64encode(server.view(reference)).decode())
    assert without_titles(made["output"]) == without_titles(twin)
    assert_kept(made["workflow"], workflow)


def test_widgets_are_labelled_in_the_language(page: Any, language: str) -> None:
    workflow = read("workflows/text_to_image.json")
    page.evaluate(LOAD, [workflow, "labels"])
    labels = page.evaluate(LABELS)
    texts = read(f"locales/{language}/nodeDefs.json")
    seen = 0
    for node in workflow["nodes"]:
        for key, entry in texts.get(node["type"], {"inputs": {}})["inputs"].items():
            shown = {widget.replace(".", "_"): label for widget, label in labels[str(node["id"])].items()}
            if key in shown:
                seen += 1
                assert shown[key] == entry["name"], (node["type"], key)
    assert seen > 10
