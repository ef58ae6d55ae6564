"""Workflows in the format of ComfyUI's user interface, turned into the format of its queue.

What the frontend's `app.graphToPrompt()` does, for the plain graphs that this pack ships;
tests/browser compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

ALWAYS = 0
NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
SEED_CONTROLS = ("fixed", "increment", "decrement", "randomize")


class UnknownGraph(ValueError):
    """The workflow has something that this converter does not know, or values that fit no input."""


def to_api(workflow: Json, object_info: Json) -> Json:
    """The prompt that the frontend queues for a workflow, by the schemas of a server's /object_info.

    Raises UnknownGraph for subgraphs, muted and bypassed nodes, unknown node types, and for
    `widgets_values` that do not fit the schema one to one.
    """
    if workflow.get("definitions"):
        raise UnknownGraph("the workflow has subgraphs")
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["mode"] != ALWAYS:
            raise UnknownGraph(f"node {node['id']} is muted or bypassed")
        if node["type"] not in object_info:
            raise UnknownGraph(f"node {node['id']} is of the unknown type {node['type']}")
        schema = object_info[node["type"]]
        inputs = _widgets(node, schema)
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title") or schema["display_name"]},
        }
    return prompt


def _widgets(node: Json, schema: Json) -> Json:
    """The values of a node's widgets by input name."""
    left = list(node.get("widgets_values", []))
    where = f"node {node['id']} ({node['type']})"
    values: Json = {}
    _take(schema["input"], schema["input_order"], "", left, values, where)
    if left:
        raise UnknownGraph(f"{where}: no input takes the last values {left}")
    return values


def _take(inputs: Json, order: Json | None, prefix: str, left: list[Any], values: Json, where: str) -> None:
    """Move the widget values of one level of inputs from `left` to `values`; recurses into dynamic combos."""
    for name, kind, options in _specs(inputs, order):
        if kind not in WIDGET_TYPES or options.get("forceInput"):
            continue
        if not left:
            raise UnknownGraph(f"{where}: there is no value for {prefix}{name}")
        value = values[prefix + name] = left.pop(0)
        if kind == DYNAMIC_COMBO:
            chosen = [option["inputs"] for option in options["options"] if option["key"] == value]
            if not chosen:
                raise UnknownGraph(f"{where}: {prefix}{name} has no option {value!r}")
            _take(chosen[0], None, f"{prefix}{name}.", left, values, where)
        if options.get("control_after_generate") and (not left or left.pop(0) not in SEED_CONTROLS):
            raise UnknownGraph(f"{where}: {prefix}{name} is not followed by one of {SEED_CONTROLS}")


def _specs(inputs: Json, order: Json | None) -> Iterator[tuple[str, str, Json]]:
    """(name, type, options) of each input, required ones first."""
    for group in ("required", "optional"):
        members = inputs.get(group, {})
        for name in (order or {}).get(group, members):
            kind, *options = members[name]
            yield name, "COMBO" if isinstance(kind, list) else kind, options[0] if options else {}
