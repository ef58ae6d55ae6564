"""The part of `run.py demo` that needs the environment: start ComfyUI, run one workflow, save its picture."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .host import ComfyServer, device_arguments
from .results import Event, NodeFailed, PromptRejected, Result, RunFailed, ServerFailed
from .workflow import Workflow, title

INTERRUPTED = 130
TERMINATED = 143


class ProgressLine:
    """Shows which node runs and how far it is: one changing line on a terminal, plain lines elsewhere."""

    def __init__(self, workflow: Workflow, out: TextIO) -> None:
        self.workflow = workflow
        self.out = out
        self.live = out.isatty()
        self._shown = ""
        self._tenth = -1

    def __call__(self, event: Event) -> None:
        node = event.data.get("node")
        if event.type == "executing" and node is not None:
            self._tenth = -1
            self._show(title(self.workflow, str(node)))
        elif event.type == "progress" and node is not None:
            self._step(str(node), float(event.data["value"]), float(event.data["max"]))

    def finish(self) -> None:
        """End the changing line."""
        if self.live and self._shown:
            self.out.write("\n")
            self.out.flush()
        self._shown = ""

    def _step(self, node: str, value: float, total: float) -> None:
        # Elsewhere than on a terminal ten lines tell as much as fifty.
        tenth = int(10 * value / total) if total else 0
        if self.live or tenth != self._tenth:
            self._tenth = tenth
            self._show(f"{title(self.workflow, node)} {value:g}/{total:g}")

    def _show(self, text: str) -> None:
        if text == self._shown:
            return
        if self.live:
            self.out.write("\r" + text.ljust(len(self._shown)))
        else:
            self.out.write(text + "\n")
        self.out.flush()
        self._shown = text


def free_name(path: Path) -> Path:
    """`path`, or the first of `<stem>-2`, `<stem>-3`, ... that doesn't exist yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def save_images(result: Result, view: Callable[[dict[str, Any]], bytes], first: Path) -> list[Path]:
    """Save a run's pictures byte for byte, so with the metadata ComfyUI put in; the first one as `first`.

    Raises ValueError when the workflow made none.
    """
    if not result.images:
        raise ValueError("the workflow ran, but saved no picture; it needs a node such as SaveImage")
    first.parent.mkdir(parents=True, exist_ok=True)
    saved = []
    for index, reference in enumerate(result.images):
        path = first if index == 0 else free_name(first)
        path.write_bytes(view(reference))
        saved.append(path)
    return saved


def run_job(job: dict[str, Any]) -> list[Path]:
    """Run the job's workflow on a server of its own and give the saved files."""
    workflow: Workflow = job["workflow"]
    models = Path(job["models_dir"]) if job["models_dir"] else None
    began = time.monotonic()
    sys.stdout.write("starting ComfyUI ...\n")
    sys.stdout.flush()
    server = ComfyServer(
        Path(job["comfy_dir"]),
        Path(job["base_dir"]),
        Path(job["pack_dir"]),
        args=device_arguments(),
        models_dir=models,
    )
    with server:
        sys.stdout.write(f"ComfyUI is up ({time.monotonic() - began:.0f} s)\n")
        progress = ProgressLine(workflow, sys.stdout)
        try:
            result = server.run(workflow, on_event=progress, timeout=float(job["timeout"]))
        finally:
            progress.finish()
        out = Path(job["out"]) if job["out"] else free_name(Path(job["folder"]) / "longcat.png")
        saved = save_images(result, server.view, out)
    server.discard_run()
    return saved


def explain(error: Exception, workflow: Workflow) -> str:
    """The error as a user should read it: for a node, its title and ComfyUI's message."""
    if isinstance(error, NodeFailed):
        name = title(workflow, error.node_id)
        return f"{name} (node {error.node_id}, {error.node_type}): {error.exception_message}"
    if isinstance(error, PromptRejected):
        return f"ComfyUI refused the workflow: {error}"
    return str(error)


def main(job_file: Path) -> int:
    """Run the job that run.py wrote to `job_file`, and delete the file. Gives the exit code."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    job_file.unlink()
    # Leaving through an exception closes the server on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        saved = run_job(job)
    except (RunFailed, PromptRejected, ServerFailed, TimeoutError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {explain(error, job['workflow'])}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return INTERRUPTED
    for path in [*saved[1:], saved[0]]:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
