"""Both translations cover every node, input and output, and nothing else."""

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

LANGUAGES = ("en", "zh")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"


def frontend_key(name: str) -> str:
    """How the frontend writes an input's name in a translation key; nested inputs are dotted."""
    return name.replace(".", "_")


def add_inputs(inputs: dict[str, Any], prefix: str, found: dict[str, dict[str, Any]]) -> None:
    """Collect the options of every input, those nested in dynamic combos too, by translation key."""
    shown = [group for kind, group in inputs.items() if kind != "hidden"]
    for name, (kind, options) in ((n, s) for group in shown for n, s in group.items()):
        found[frontend_key(prefix + name)] = {"name": name, **options}
        if kind == DYNAMIC_COMBO:
            for option in options["options"]:
                add_inputs(option["inputs"], f"{prefix}{name}.", found)


@pytest.fixture(scope="module")
def schemas(comfy_dir: Path) -> dict[str, dict[str, Any]]:
    """/object_info of every node of the pack, without a server."""
    pack = importlib.import_module("longcat_pack")
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    infos = [node.GET_NODE_INFO_V1() for node in nodes]
    return {info["name"]: info for info in infos}


@pytest.fixture(scope="module")
def texts(pack_dir: Path) -> dict[str, dict[str, Any]]:
    """The translations by language."""
    path = "locales/{}/nodeDefs.json"
    return {code: json.loads((pack_dir / path.format(code)).read_text("utf-8")) for code in LANGUAGES}


def inputs_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of every input of a node by translation key."""
    found: dict[str, dict[str, Any]] = {}
    add_inputs(schema["input"], "", found)
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_there_and_nothing_else(
    language: str, schemas: dict[str, Any], texts: dict[str, Any]
) -> None:
    assert set(texts[language]) == set(schemas)
    for node, text in texts[language].items():
        assert set(text) == {"display_name", "description", "inputs", "outputs"}, node
        assert set(text["inputs"]) == set(inputs_of(schemas[node])), node
        assert set(text["outputs"]) == {str(index) for index in range(len(schemas[node]["output"]))}, node


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_empty(language: str, texts: dict[str, Any]) -> None:
    for node, text in texts[language].items():
        assert text["display_name"].strip() and text["description"].strip(), node
        for entry in (*text["inputs"].values(), *text["outputs"].values()):
            assert set(entry) == {"name", "tooltip"}, node
            assert all(value.strip() for value in entry.values()), (node, entry)


def test_english_is_what_the_nodes_themselves_say(schemas: dict[str, Any], texts: dict[str, Any]) -> None:
    for node, schema in schemas.items():
        text = texts["en"][node]
        assert (text["display_name"], text["description"]) == (schema["display_name"], schema["description"])
        for key, options in inputs_of(schema).items():
            assert text["inputs"][key] == {"name": options["name"], "tooltip": options["tooltip"]}, (
                node,
                key,
            )
        for index, (name, tooltip) in enumerate(zip(schema["output_name"], schema["output_tooltips"], strict=True)):
            entry = text["outputs"][str(index)]
            assert entry["name"] == name
            assert tooltip in (None, entry["tooltip"]), (node, name)


def test_chinese_is_chinese(texts: dict[str, Any]) -> None:
    def is_chinese(value: str) -> bool:
        return any("一" <= character <= "鿿" for character in value)

    for node, text in texts["zh"].items():
        tooltips = [entry["tooltip"] for kind in ("inputs", "outputs") for entry in text[kind].values()]
        for value in (text["display_name"], text["description"], *tooltips):
            assert is_chinese(value), (node, value)
