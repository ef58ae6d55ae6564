"""Prompt rewriting by an OpenAI-compatible endpoint (chat completions), over http or https.

One request, to the address that was asked for and nowhere else: redirects are refused, and the key goes into one
header and into no message.
"""

import http.client
import json
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .errors import LongCatError
from .rewriting import Rewrite, Sampling, finished

LARGEST_ANSWER = 4 * 2**20
_POLL_SECONDS = 0.1
_DETAIL = 300


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, for which model, for how many seconds at most, and with which key, which may be empty."""

    base_url: str
    model: str
    timeout: float
    key: str = ""

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"  # without the key

    @property
    def host(self) -> str:
        """The name of the machine, with its port."""
        return _split(self.base_url).netloc

    @property
    def address(self) -> str:
        """Where the request goes.

        Raises:
            LongCatError: it is no plain http(s) address.
        """
        parts = _split(self.base_url)
        is_plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        if not is_plain or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", self.base_url.strip()):
            raise LongCatError(
                "base_url has to be a plain address such as https://example.org/v1, beginning with http:// or "
                "https://, without a user name, key, ? or #. Put the address of the endpoint there; the key belongs "
                "in the environment.",
                "base_url 必须是以 http:// 或 https:// 开头的普通地址，例如 https://example.org/v1，"
                "不含用户名、密钥、? 或 #。请填写服务地址；密钥应放在环境变量中。",
            )
        return f"{self.base_url.strip().rstrip('/')}/chat/completions"


def ask(endpoint: Endpoint, question: str, sampling: Sampling, progress: Callable[[int, int], None]) -> Rewrite:
    """The endpoint's answer to one message.

    Args:
        progress: is called ten times a second with seconds gone and their limit; may raise to stop waiting.

    Raises:
        LongCatError: the address, the model's name or the key cannot be used, the endpoint cannot be reached, takes
            too long, refuses, or answers in another format.
    """
    request = _request(endpoint, question, sampling)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send() -> None:
        try:
            answers.put(_send(request, endpoint))
        except Exception as error:
            answers.put(error)

    # The thread cannot be stopped while it waits for the network, so it may outlive an interrupted run.
    threading.Thread(target=send, name="longcat-rewrite", daemon=True).start()
    answer = _wait(answers, endpoint, progress)
    if isinstance(answer, Exception):
        raise answer
    return _read(endpoint, answer)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The library would hand the key on to wherever the endpoint points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""


def _request(endpoint: Endpoint, question: str, sampling: Sampling) -> urllib.request.Request:
    address = endpoint.address
    if not endpoint.model.strip():
        raise LongCatError(
            "The endpoint needs the name of a model. Put it into model.",
            "该服务需要模型名称。请在 model 中填写。",
        )
    if endpoint.key and not re.fullmatch(r"[!-~]+", endpoint.key):
        raise LongCatError(
            "The key in the environment has characters that no key has. Set the variable again, without line breaks.",
            "环境变量中的密钥含有非法字符。请重新设置该变量，不要包含换行。",
        )
    body = {
        "model": endpoint.model.strip(),
        "messages": [{"role": "user", "content": question}],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed % 2**31,  # what every server takes
        "stream": False,
    }
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode("utf-8"), headers, method="POST")
    if endpoint.key:
        request.add_unredirected_header("Authorization", f"Bearer {endpoint.key}")
    return request


def _send(request: urllib.request.Request, endpoint: Endpoint) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=endpoint.timeout) as response:
            answer: bytes = response.read(LARGEST_ANSWER + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(endpoint, error.code, error.read(LARGEST_ANSWER)) from None
    except TimeoutError:
        raise _too_late(endpoint) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _too_late(endpoint) from None
        cause = _clean(endpoint, f"{type(reason).__name__}: {reason}")
        raise LongCatError(
            f"'{endpoint.host}' cannot be reached ({cause}). Check base_url and that the server runs, or set source "
            "to text encoder.",
            f"无法连接“{endpoint.host}”（{cause}）。请检查 base_url 及服务是否在运行，或把来源设为 text encoder。",
        ) from None
    if len(answer) > LARGEST_ANSWER:
        raise _not_understood(endpoint, f"more than {LARGEST_ANSWER} bytes")
    return answer


def _wait(answers: "queue.SimpleQueue[Any]", endpoint: Endpoint, progress: Callable[[int, int], None]) -> Any:
    start = time.monotonic()
    while (gone := time.monotonic() - start) < endpoint.timeout:
        progress(int(gone), max(1, int(endpoint.timeout)))
        try:
            return answers.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
    raise _too_late(endpoint)


def _read(endpoint: Endpoint, answer: bytes) -> Rewrite:
    try:
        content = json.loads(answer)
        choice = content["choices"][0]
        text = choice["message"]["content"]
        usage = content.get("usage") or {}
        tokens = int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _not_understood(endpoint, _shown(endpoint, answer)) from None
    if not isinstance(text, str):
        raise _not_understood(endpoint, _shown(endpoint, answer))
    return finished(text, tokens, choice.get("finish_reason") != "length")


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address.strip())
        _ = parts.port  # raises if it is no number
    except ValueError:
        return SplitResult("", "", "", "", "")
    return parts


def _clean(endpoint: Endpoint, text: str) -> str:
    return text.replace(endpoint.key, "***") if endpoint.key else text


def _shown(endpoint: Endpoint, answer: bytes) -> str:
    text = " ".join(_clean(endpoint, answer.decode("utf-8", "replace")).split())
    return text[:_DETAIL] + (" …" if len(text) > _DETAIL else "")


def _refused(endpoint: Endpoint, status: int, answer: bytes) -> LongCatError:
    said = _shown(endpoint, answer)
    if 300 <= status < 400:
        en, zh = (
            "It points elsewhere; put the final address into base_url.",
            "服务要求跳转；请在 base_url 中填写最终地址。",
        )
    elif status in (401, 403):
        en = (
            "Set LONGCAT_REWRITE_API_KEY to a valid key and LONGCAT_REWRITE_API_URL to the very base_url that it is "
            "for, in the environment that ComfyUI starts in."
        )
        zh = (
            "请在启动 ComfyUI 的环境中把 LONGCAT_REWRITE_API_KEY 设为有效的密钥，"
            "并把 LONGCAT_REWRITE_API_URL 设为与该密钥对应的 base_url。"
        )
    elif status == 404:
        en, zh = "Check base_url (it often ends in /v1) and model.", "请检查 base_url（通常以 /v1 结尾）和 model。"
    else:
        en, zh = "Use another model or try later.", "请换用其他模型或稍后再试。"
    return LongCatError(
        f"'{endpoint.host}' refused with status {status}: {said}. {en}",
        f"“{endpoint.host}”拒绝了请求，状态 {status}：{said}。{zh}",
    )


def _too_late(endpoint: Endpoint) -> LongCatError:
    return LongCatError(
        f"'{endpoint.host}' did not answer within {endpoint.timeout:g} s. Set a longer timeout, or use a faster model.",
        f"“{endpoint.host}”在 {endpoint.timeout:g} 秒内没有应答。请调大超时，或换用更快的模型。",
    )


def _not_understood(endpoint: Endpoint, found: str) -> LongCatError:
    return LongCatError(
        f"'{endpoint.host}' answers in another format: expected a chat completion with choices[0].message.content, "
        f"found: {found}. Choose an OpenAI-compatible endpoint; base_url often ends in /v1.",
        f"“{endpoint.host}”的应答格式不符：应为含 choices[0].message.content 的 chat completion，实际为：{found}。"
        "请选择兼容 OpenAI 的服务；base_url 通常以 /v1 结尾。",
    )
