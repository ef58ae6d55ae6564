"""Reading API-format workflows and setting their inputs. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Workflow = dict[str, dict[str, Any]]

PROMPT_TITLE = "Prompt"
PROMPT_INPUTS = ("prompt", "text")
SEED_INPUTS = ("seed", "noise_seed")


class WorkflowError(ValueError):
    """The file is no API-format workflow, or it has no such node or input."""


def load_workflow(path: Path) -> Workflow:
    """Read an API-format workflow: node id to `class_type`, `inputs` and `_meta`.

    Raises WorkflowError for a missing file, for text that is not JSON, and for UI-format workflows.
    """
    if not path.is_file():
        raise WorkflowError(f"there is no workflow file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("nodes"), list):
        raise WorkflowError(
            f"{path} is a workflow in the format of the user interface, which the server's queue cannot run; "
            "open it in ComfyUI and save it with Workflow > Export (API)"
        )
    if not isinstance(content, dict) or not content:
        raise WorkflowError(f"{path} is no API-format workflow: expected an object of nodes by their ids")
    for node_id, node in content.items():
        if not isinstance(node, dict) or "class_type" not in node or not isinstance(node.get("inputs"), dict):
            raise WorkflowError(f"{path} is no API-format workflow: node {node_id} has no class_type and inputs")
    return content


def title(workflow: Workflow, node_id: str) -> str:
    """What a user knows a node by: its title, or its class where it has none."""
    node = workflow.get(node_id, {})
    return str(node.get("_meta", {}).get("title") or node.get("class_type") or node_id)


def set_prompt(workflow: Workflow, prompt: str) -> None:
    """Set the prompt text of the node titled "Prompt". Raises WorkflowError when there is none."""
    nodes = [node for node_id, node in workflow.items() if title(workflow, node_id) == PROMPT_TITLE]
    places = [(node, name) for node in nodes for name in PROMPT_INPUTS if name in node["inputs"]]
    if not places:
        raise WorkflowError(
            f"--prompt needs a node titled {PROMPT_TITLE} with an input named {' or '.join(PROMPT_INPUTS)}; "
            f"use --set instead. The nodes are: {_nodes(workflow)}"
        )
    for node, name in places:
        node["inputs"][name] = prompt


def set_seed(workflow: Workflow, seed: int) -> None:
    """Set every input named seed or noise_seed. Raises WorkflowError when there is none."""
    places = [(node, name) for node in workflow.values() for name in SEED_INPUTS if name in node["inputs"]]
    if not places:
        raise WorkflowError(f"--seed: no node has an input named {' or '.join(SEED_INPUTS)}")
    for node, name in places:
        node["inputs"][name] = seed


def set_input(workflow: Workflow, assignment: str) -> None:
    """Apply NODE.INPUT=VALUE: NODE is an id or a title, VALUE is read as JSON and otherwise taken as text.

    Raises WorkflowError, with the choices, for an unknown node or input and for a title that is not unique.
    """
    place, equals, text = assignment.partition("=")
    node_name, dot, input_name = place.partition(".")
    if not (equals and dot and node_name and input_name):
        raise WorkflowError(f"--set {assignment}: expected NODE.INPUT=VALUE, for example 4.steps=8")
    node = _find_node(workflow, node_name)
    if input_name not in node["inputs"]:
        known = ", ".join(sorted(node["inputs"])) or "none"
        raise WorkflowError(f"node {node_name} ({node['class_type']}) has no input {input_name}; it has: {known}")
    try:
        node["inputs"][input_name] = json.loads(text)
    except ValueError:
        node["inputs"][input_name] = text


def edited(
    workflow: Workflow, *, prompt: str | None = None, seed: int | None = None, assignments: Iterable[str] = ()
) -> Workflow:
    """A copy of the workflow with the prompt, the seed and the single inputs set, in this order."""
    copy: Workflow = json.loads(json.dumps(workflow))
    if prompt is not None:
        set_prompt(copy, prompt)
    if seed is not None:
        set_seed(copy, seed)
    for assignment in assignments:
        set_input(copy, assignment)
    return copy


def _find_node(workflow: Workflow, name: str) -> dict[str, Any]:
    if name in workflow:
        return workflow[name]
    titled = [node_id for node_id in workflow if title(workflow, node_id) == name]
    if len(titled) > 1:
        raise WorkflowError(f"several nodes are titled {name}; use one of their ids: {', '.join(titled)}")
    if not titled:
        raise WorkflowError(f"the workflow has no node {name}; the nodes are: {_nodes(workflow)}")
    return workflow[titled[0]]


def _nodes(workflow: Workflow) -> str:
    return ", ".join(f"{node_id} ({title(workflow, node_id)})" for node_id in workflow)
