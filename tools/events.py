"""The websocket side of a ComfyUI server: one background thread listens, any thread may read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias, TypeVar

import aiohttp

from .results import Event, Json, ServerFailed

T = TypeVar("T")
_Socket: TypeAlias = "aiohttp.ClientWebSocketResponse[Any]"

# ComfyUI's protocol.py, BinaryEventTypes
PREVIEW_IMAGE = 1
TEXT = 3
PREVIEW_IMAGE_WITH_METADATA = 4
MAX_MESSAGE_BYTES = 256 * 2**20


class Connection:
    """An event loop in a thread of its own, holding the HTTP session and the websocket to one server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client_id = uuid.uuid4().hex
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="comfy-connection", daemon=True)
        self._thread.start()
        self._session = self.call(self._open_session())
        self._heard = threading.Condition()
        self._streams: dict[str, list[Event]] = defaultdict(list)
        self._running: str | None = None
        self._closed: str | None = None
        self._listener: asyncio.Task[None] | None = None

    def call(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the connection's loop and give its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def request(self, method: str, path: str, *, timeout: float = 60.0, **options: Any) -> tuple[int, bytes]:
        """Send one HTTP request (aiohttp's options) and give status and body."""
        return self.call(self._request(method, path, aiohttp.ClientTimeout(total=timeout), options))

    def listen(self) -> None:
        """Open the websocket; from here on every message about our prompts is kept."""
        socket = self.call(self._open_socket(), timeout=60)
        self._listener = self.call(self._start_listener(socket))

    def events(self, prompt_id: str, *, timeout: float, alive: Callable[[], None]) -> Iterator[Event]:
        """Yield a prompt's messages as they come, and end when the server has finished the prompt.

        `alive` is called about once a second and raises when the server is gone.
        Raises TimeoutError after `timeout` seconds, ServerFailed when the websocket closed.
        """
        deadline = time.monotonic() + timeout
        position = 0
        while True:
            event = self._next(prompt_id, position)
            if event is not None:
                position += 1
                yield event
                if event.type == "executing" and event.data.get("node") is None:
                    return
                continue
            alive()
            if self._closed is not None:
                raise ServerFailed(f"the websocket to {self.url} closed: {self._closed}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id} did not finish within {timeout:g} seconds")

    def close(self) -> None:
        """Close the websocket and the session, and end the thread."""
        with contextlib.suppress(TimeoutError):
            self.call(self._close(), timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    def _next(self, prompt_id: str, position: int) -> Event | None:
        with self._heard:
            stream = self._streams[prompt_id]
            if len(stream) <= position and self._closed is None:
                self._heard.wait(timeout=1.0)
            return stream[position] if len(stream) > position else None

    async def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    async def _request(
        self, method: str, path: str, timeout: aiohttp.ClientTimeout, options: Json
    ) -> tuple[int, bytes]:
        async with self._session.request(method, self.url + path, timeout=timeout, **options) as response:
            return response.status, await response.read()

    async def _open_socket(self) -> _Socket:
        socket = await self._session.ws_connect(
            f"{self.url}/ws?clientId={self.client_id}", max_msg_size=MAX_MESSAGE_BYTES
        )
        # Must be the first message: previews then carry the id of the node that sent them.
        await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        return socket

    async def _start_listener(self, socket: _Socket) -> asyncio.Task[None]:
        return asyncio.create_task(self._listen(socket))

    async def _listen(self, socket: _Socket) -> None:
        reason = "the server closed it"
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    self._hear_json(json.loads(message.data))
                elif message.type is aiohttp.WSMsgType.BINARY:
                    self._hear_bytes(message.data)
        except (aiohttp.ClientError, ValueError, KeyError, struct.error) as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            with self._heard:
                self._closed = reason
                self._heard.notify_all()

    def _hear_json(self, message: Json) -> None:
        data = message.get("data") or {}
        if data.get("prompt_id"):
            self._running = data["prompt_id"]
            self._keep(self._running, Event(message["type"], data))

    def _hear_bytes(self, message: bytes) -> None:
        (kind,) = struct.unpack_from(">I", message)
        (number,) = struct.unpack_from(">I", message, 4)
        body = message[8:]
        if kind == PREVIEW_IMAGE_WITH_METADATA:
            metadata = json.loads(body[:number])
            data = {"node": metadata["node_id"], "mime": metadata["image_type"], "image": body[number:]}
            self._keep(metadata["prompt_id"], Event("preview", data))
        elif kind == PREVIEW_IMAGE and self._running:
            data = {"node": None, "mime": "image/png" if number == 2 else "image/jpeg", "image": body}
            self._keep(self._running, Event("preview", data))
        elif kind == TEXT and self._running:
            data = {"node": body[:number].decode(), "text": body[number:].decode()}
            self._keep(self._running, Event("progress_text", data))

    def _keep(self, prompt_id: str, event: Event) -> None:
        with self._heard:
            self._streams[prompt_id].append(event)
            self._heard.notify_all()

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
        await self._session.close()
