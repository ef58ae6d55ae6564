"""What a run of a workflow on a ComfyUI server gives back, and the errors it can end with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = dict[str, Any]


class Event(NamedTuple):
    """One websocket message about a prompt.

    `type` is ComfyUI's own name (`execution_start`, `executing`, `progress`, `progress_state`, `executed`,
    ...), or for its binary messages `preview` (data: `node`, `mime`, `image` as bytes) or `progress_text`
    (data: `node`, `text`).
    """

    type: str
    data: Json


class Preview(NamedTuple):
    """A preview image as the server encoded it; `node` is the node that sent it, or None when unknown."""

    image: bytes
    mime: str
    node: str | None


@dataclass(frozen=True)
class Result:
    """A finished prompt.

    `outputs` is the history's: node id to what that node's UI shows (`{"images": [reference, ...]}`).
    `events` holds the JSON messages in the order in which they came, `previews` the images between them.
    """

    prompt_id: str
    status: str
    outputs: dict[str, Json]
    events: list[Event]
    previews: list[Preview] = field(default_factory=list)
    cached_nodes: list[str] = field(default_factory=list)
    executed_nodes: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[Json]:
        """References (`filename`, `subfolder`, `type`) of all the images in the outputs, saved ones first."""
        found = [ref for output in self.outputs.values() for ref in output.get("images", [])]
        return sorted(found, key=lambda ref: ref.get("type") != "output")


class ServerFailed(RuntimeError):
    """The server did not start, or it went away; the message ends with the last lines of its log."""


class PromptRejected(ValueError):
    """The server's validation refused the workflow. `node_errors` is its own table, by node id."""

    def __init__(self, error: Json | str, node_errors: Json) -> None:
        self.node_errors = node_errors
        super().__init__(_rejection(error, node_errors))


class RunFailed(RuntimeError):
    """A queued prompt did not reach its end. `events` holds what was heard before."""

    def __init__(self, message: str, prompt_id: str, events: Sequence[Event]) -> None:
        self.prompt_id = prompt_id
        self.events = list(events)
        super().__init__(message)


class Interrupted(RunFailed):
    """The prompt was interrupted while `node_id` (of class `node_type`) ran."""

    def __init__(self, data: Json, events: Sequence[Event]) -> None:
        self.node_id = str(data.get("node_id"))
        self.node_type = str(data.get("node_type"))
        super().__init__(f"interrupted in node {self.node_id} ({self.node_type})", data["prompt_id"], events)


class NodeFailed(RunFailed):
    """A node raised; the exception's type, message and traceback are ComfyUI's words."""

    def __init__(self, data: Json, events: Sequence[Event]) -> None:
        self.node_id = str(data.get("node_id"))
        self.node_type = str(data.get("node_type"))
        self.exception_type = str(data.get("exception_type"))
        self.exception_message = str(data.get("exception_message")).strip()
        self.traceback = "".join(data.get("traceback") or [])
        node = f"node {self.node_id} ({self.node_type})"
        message = f"{node} failed with {self.exception_type}: {self.exception_message}"
        super().__init__(message, data["prompt_id"], events)


def collect(prompt_id: str, events: Sequence[Event], history: Json) -> Result:
    """Turn what was heard about a finished prompt, and its history entry, into a Result.

    Raises NodeFailed or Interrupted when that is how the prompt ended.
    """
    by_type = {event.type: event.data for event in events}
    if "execution_error" in by_type:
        raise NodeFailed(by_type["execution_error"], events)
    if "execution_interrupted" in by_type:
        raise Interrupted(by_type["execution_interrupted"], events)
    executing = [event.data.get("node") for event in events if event.type == "executing"]
    return Result(
        prompt_id=prompt_id,
        status=history["status"]["status_str"],
        outputs=history["outputs"],
        events=[event for event in events if event.type != "preview"],
        previews=[_preview(event.data) for event in events if event.type == "preview"],
        cached_nodes=[str(node) for node in by_type.get("execution_cached", {}).get("nodes", [])],
        executed_nodes=list(dict.fromkeys(str(node) for node in executing if node is not None)),
    )


def _preview(data: Json) -> Preview:
    return Preview(data["image"], data["mime"], data["node"])


def _rejection(error: Json | str, node_errors: Json) -> str:
    if isinstance(error, str):
        lines = [error]
    else:
        lines = [": ".join(str(error[key]) for key in ("message", "details") if error.get(key))]
    for node_id, entry in node_errors.items():
        for problem in entry.get("errors", []):
            lines.append(f"node {node_id} ({entry.get('class_type', '?')}): {_problem(problem)}")
    return "\n".join(dict.fromkeys(lines))


def _problem(problem: Json) -> str:
    details = str(problem.get("details") or "")
    if problem.get("type") == "custom_validation_failed" and " - " in details:
        # The node's own sentence, which ComfyUI repeats for every input that the node looks at.
        return details.partition(" - ")[2]
    return ": ".join(text for text in (str(problem.get("message") or ""), details) if text)
