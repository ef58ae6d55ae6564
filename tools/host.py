"""A real ComfyUI server as a context manager: start it, queue workflows, listen, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import aiohttp

from .environment import prepare_base_dir
from .events import Connection
from .results import Event, Json, PromptRejected, Result, ServerFailed, collect

LOG_TAIL_LINES = 40


class ComfyServer:
    """One ComfyUI process with this pack as its only custom node.

    comfy_dir: a ComfyUI checkout, never written to. base_dir: ComfyUI's `--base-directory`; it gets
    `custom_nodes` with a link to pack_dir, and `models`, `input`, `output`, `user`. args: further flags of
    main.py (`--cpu` ...). env: variables on top of this process's own. models_dir: a further models folder
    whose files are offered too.
    """

    def __init__(
        self,
        comfy_dir: Path,
        base_dir: Path,
        pack_dir: Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        models_dir: Path | None = None,
    ) -> None:
        self.comfy_dir = Path(comfy_dir).resolve()
        self.base_dir = Path(base_dir).resolve()
        self.pack_dir = Path(pack_dir).resolve()
        self.args = list(args)
        self.env = dict(env or {})
        self.models_dir = models_dir
        self.url = ""
        self.log_path = self.base_dir / "comfyui.log"
        self._run_dir = self.base_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None when there is none."""
        return self._process.pid if self._process else None

    def start(self, timeout: float = 180) -> None:
        """Start the server and wait for its answer. Raises ServerFailed, with the log's end, without one."""
        if self._process is not None:
            raise RuntimeError("this server is already running; call stop() first")
        prepare_base_dir(self.base_dir, self.pack_dir)
        # Own folder per run: main.py empties its temp directory when it starts and when it ends.
        self._run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=self.base_dir))
        self.log_path = self._run_dir / "comfyui.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log_path.open("wb") as log:
            self._process = spawn(self._command(port), self.comfy_dir, self._environment(), log)
        try:
            self._connection = Connection(self.url)
            self._wait_until_up(timeout)
            self._connection.listen()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and everything it started; does nothing when it is not running. The log stays."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            end_process(self._process)
            self._process = None
        shutil.rmtree(self._run_dir / "temp", ignore_errors=True)

    def discard_run(self) -> None:
        """Stop, and delete this run's log and temporary files as well."""
        self.stop()
        if self._run_dir != self.base_dir:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def object_info(self, node_id: str | None = None) -> Json:
        """The schema of every node, or `{node_id: schema}` for one ({} when there is no such node)."""
        return self._json("GET", "/object_info" + (f"/{node_id}" if node_id else ""))

    def queue(self, prompt: Json, *, extra_data: Json | None = None, front: bool = False) -> str:
        """Queue an API-format workflow and give its prompt id.

        Raises PromptRejected when validation refuses the workflow or any of its outputs.
        """
        client_id = self._connected().client_id
        body = {"prompt": prompt, "client_id": client_id, "extra_data": extra_data or {}, "front": front}
        status, answer = self._connected().request("POST", "/prompt", json=body)
        reply: Json = json.loads(answer)
        if status != 200:
            raise PromptRejected(reply["error"], reply.get("node_errors") or {})
        prompt_id: str = reply["prompt_id"]
        if reply.get("node_errors"):
            # ComfyUI would run the outputs that are valid and drop the others without a word.
            self._json("POST", "/queue", json={"delete": [prompt_id]})
            self.interrupt(prompt_id)
            raise PromptRejected("some outputs of the workflow are not valid", reply["node_errors"])
        return prompt_id

    def events(self, prompt_id: str, *, timeout: float = 600) -> Iterator[Event]:
        """Yield the messages about a queued prompt, from its first one, until the server has finished it."""
        try:
            yield from self._connected().events(prompt_id, timeout=timeout, alive=self._check_alive)
        except ServerFailed:
            # The websocket notices the end of a process before the process table does.
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
            self._check_alive()
            raise

    def wait(self, prompt_id: str, *, on_event: Callable[[Event], None] | None = None, timeout: float = 600) -> Result:
        """Wait for a queued prompt; `on_event` is called in this thread and may call interrupt().

        Raises NodeFailed, Interrupted, TimeoutError or ServerFailed.
        """
        heard: list[Event] = []
        for event in self.events(prompt_id, timeout=timeout):
            heard.append(event)
            if on_event is not None:
                on_event(event)
        return collect(prompt_id, heard, self.history(prompt_id))

    def run(
        self,
        prompt: Json,
        *,
        extra_data: Json | None = None,
        on_event: Callable[[Event], None] | None = None,
        timeout: float = 600,
    ) -> Result:
        """queue() and wait() in one."""
        return self.wait(self.queue(prompt, extra_data=extra_data), on_event=on_event, timeout=timeout)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Ask the server to stop the running prompt, or only the one named."""
        self._json("POST", "/interrupt", json={"prompt_id": prompt_id} if prompt_id else {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask the server to unload its models and to drop its cached results, once it is idle."""
        self._json("POST", "/free", json={"unload_models": unload_models, "free_memory": free_memory})

    def history(self, prompt_id: str) -> Json:
        """A finished prompt's history entry (`prompt`, `outputs`, `status`). Raises KeyError without one."""
        entry: Json = self._json("GET", f"/history/{prompt_id}")[prompt_id]
        return entry

    def view(self, image_ref: Mapping[str, str]) -> bytes:
        """The bytes of an image that a Result refers to, as the server stored them (metadata included)."""
        params = {key: image_ref.get(key, "") for key in ("filename", "subfolder", "type")}
        return self._checked("GET", "/view", params=params)

    def upload_image(self, path: Path) -> str:
        """Copy an image into the server's input folder and give the name that LoadImage knows it by."""
        form = aiohttp.FormData()
        form.add_field("image", Path(path).read_bytes(), filename=Path(path).name)
        form.add_field("overwrite", "true")
        name: str = json.loads(self._checked("POST", "/upload/image", data=form))["name"]
        return name

    def log_text(self) -> str:
        """All that the server has written so far, stdout and stderr together."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def get(self, path: str) -> bytes:
        """The body of any other address of the server (`/system_stats`, `/extensions/...`)."""
        return self._checked("GET", path)

    def _command(self, port: int) -> list[str]:
        command = [sys.executable, str(self.comfy_dir / "main.py")]
        command += [
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--disable-auto-launch",
            "--disable-api-nodes",
        ]
        command += ["--base-directory", str(self.base_dir), "--temp-directory", str(self._run_dir)]
        command += ["--database-url", "sqlite:///:memory:"]
        if self.models_dir is not None:
            command += ["--extra-model-paths-config", str(write_model_paths(self.models_dir, self._run_dir))]
        return command + self.args

    def _environment(self) -> dict[str, str]:
        # A PYTHONPATH that names the pack would let its `nodes` package hide ComfyUI's nodes.py.
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return {**inherited, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **self.env}

    def _connected(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the server is not running; call start() or use it in a with statement")
        return self._connection

    def _checked(self, method: str, path: str, **options: Any) -> bytes:
        status, body = self._connected().request(method, path, **options)
        if status != 200:
            raise RuntimeError(f"{method} {path} answered {status}: {body[:500].decode(errors='replace')}")
        return body

    def _json(self, method: str, path: str, **options: Any) -> Json:
        body = self._checked(method, path, **options)
        answer: Json = json.loads(body) if body else {}
        return answer

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            self._check_alive()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                if self._connected().request("GET", "/system_stats", timeout=10)[0] == 200:
                    return
            if time.monotonic() > deadline:
                raise ServerFailed(f"ComfyUI did not answer within {timeout:g} seconds\n{self._log_tail()}")
            time.sleep(0.2)

    def _check_alive(self) -> None:
        code = self._process.poll() if self._process else None
        if self._process is None or code is not None:
            raise ServerFailed(f"ComfyUI ended with exit code {code}\n{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log_text().splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"last lines of {self.log_path}:", *lines])


def device_arguments() -> list[str]:
    """main.py's flags for this machine: none where torch sees an accelerator, `--cpu` where it does not."""
    import torch

    found = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return [] if found else ["--cpu"]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_model_paths(models_dir: Path, folder: Path) -> Path:
    """Write the file for --extra-model-paths-config that offers every subfolder of `models_dir`."""
    kinds = {entry.name: entry.name for entry in sorted(models_dir.iterdir()) if entry.is_dir()}
    path = folder / "extra_model_paths.yaml"
    # JSON is YAML; this spares quoting rules and a dependency.
    path.write_text(json.dumps({"checkout": {"base_path": str(models_dir), **kinds}}), encoding="utf-8")
    return path


def spawn(
    command: Sequence[str], folder: Path, variables: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a process as the head of a group of its own: Ctrl-C reaches us alone, and we end the group."""
    windows = os.name == "nt"
    return subprocess.Popen(
        list(command),
        cwd=folder,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=not windows,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) if windows else 0,
    )


def end_process(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """End a process made by spawn() and its children: first politely, then for certain."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        process.wait()
        return
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
