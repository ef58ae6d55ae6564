"""The endpoint gets one request with the key in one header; whatever goes wrong ends in words, without the key."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from diffusers.pipelines.longcat_image.pipeline_longcat_image import get_prompt_language

from longcat_pack.longcat_backend import rewrite_endpoint, rewriting
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.rewrite_endpoint import Endpoint
from longcat_pack.longcat_backend.rewriting import Sampling

KEY = "secret-4711"
SAMPLING = Sampling(2**63 + 5, 0.5, 100)


class Served:
    """A local server whose answer a test chooses, and the requests that it got."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: bytes = answer("a red circle on white")
        self.release = threading.Event()
        self.release.set()
        self.requests: list[dict[str, Any]] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                served.requests.append(
                    {"path": self.path, "headers": dict(self.headers), "body": json.loads(self.rfile.read(length))}
                )
                served.release.wait(30)
                self.send_response(served.status)
                for name, value in {"Content-Length": str(len(served.body)), **served.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(served.body)

            def do_GET(self) -> None:
                served.requests.append({"path": self.path, "headers": dict(self.headers), "body": None})
                self.send_error(418)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def endpoint(self, **changes: Any) -> Endpoint:
        return Endpoint(**{"base_url": self.url, "model": "writer", "timeout": 20.0, "key": KEY, **changes})


def answer(text: Any, reason: str = "stop") -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Served()
    threading.Thread(target=served.server.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    served.release.set()
    served.server.shutdown()
    served.server.server_close()


def ask(endpoint: Endpoint, progress: Callable[[int, int], None] = lambda *_: None) -> rewriting.Rewrite:
    return rewrite_endpoint.ask(endpoint, "the question", SAMPLING, progress)


def refusal(endpoint: Endpoint) -> str:
    """The sentence of a refusal, in both languages, which never has the key."""
    with pytest.raises(LongCatError) as caught:
        ask(endpoint)
    assert caught.value.__cause__ is None
    assert KEY not in str(caught.value) and KEY not in repr(caught.getrepr(showlocals=False))
    assert any("一" <= character <= "鿿" for character in caught.value.zh)
    return str(caught.value)


def test_one_request_with_question_settings_and_key(served: Served) -> None:
    assert ask(served.endpoint(base_url=served.url + "/ ")) == rewriting.Rewrite("a red circle on white", 7, True)
    (request,) = served.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {
        "model": "writer",
        "messages": [{"role": "user", "content": "the question"}],
        "temperature": 0.5,
        "max_tokens": 100,
        "seed": 5,
        "stream": False,
    }
    assert KEY not in json.dumps(request["body"])


def test_without_a_key_there_is_no_header_for_one(served: Served) -> None:
    ask(served.endpoint(key=""))
    assert "Authorization" not in served.requests[0]["headers"]


def test_the_key_is_in_no_representation(served: Served) -> None:
    assert KEY not in repr(served.endpoint())


def test_an_answer_that_was_cut_is_known_as_such(served: Served) -> None:
    served.body = answer("a red", "length")
    assert ask(served.endpoint()) == rewriting.Rewrite("a red", 7, False)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "LONGCAT_REWRITE_API_KEY"),
        (403, "LONGCAT_REWRITE_API_URL"),
        (404, "/v1"),
        (429, "try later"),
        (500, "try later"),
    ],
)
def test_a_refusal_names_status_and_remedy(served: Served, status: int, words: str) -> None:
    served.status, served.body = status, json.dumps({"error": f"bad key {KEY} " + "x" * 1000}).encode()
    said = refusal(served.endpoint())
    assert f"status {status}" in said and words in said and "bad key ***" in said
    assert len(said) < 2000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(served: Served, status: int) -> None:
    served.status, served.headers = status, {"Location": served.url.replace("v1", "elsewhere")}
    assert "points elsewhere" in refusal(served.endpoint())
    assert [request["path"] for request in served.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": 3}]}',
        answer(None),
        answer(3),
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"choices": [{"message": {"content": "x"}}], "usage": 3}',
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": "many"}}',
    ],
    ids=range(11),
)
def test_an_answer_in_another_format_is_refused(served: Served, body: bytes) -> None:
    served.body = body
    assert "choices[0].message.content" in refusal(served.endpoint())


def test_an_endless_answer_is_refused(served: Served) -> None:
    served.body = b"x" * (rewrite_endpoint.LARGEST_ANSWER + 10)
    assert "more than" in refusal(served.endpoint())


def test_an_empty_answer_is_refused(served: Served) -> None:
    served.body = answer(" \n")
    assert "empty" in refusal(served.endpoint())


def test_no_server_no_answer(served: Served) -> None:
    served.server.server_close()
    assert "cannot be reached" in refusal(served.endpoint())


def test_a_silent_server_ends_at_the_timeout(served: Served) -> None:
    served.release.clear()
    assert "did not answer within 0.5 s" in refusal(served.endpoint(timeout=0.5))


def test_interruption_does_not_wait_for_the_server(served: Served) -> None:
    class Stop(Exception):
        """What the host raises."""

    def progress(done: int, total: int) -> None:
        assert 0 <= done < total == 600
        if served.requests:
            raise Stop

    served.release.clear()
    with pytest.raises(Stop):
        ask(served.endpoint(timeout=600.0), progress)
    assert not served.release.is_set()  # and the server has not answered


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org/v1",
        "ftp://example.org",
        "file:///etc/passwd",
        "http://",
        "http:///v1",
        "http://user:pass@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=1",
        "http://127.0.0.1/v1#x",
        "http://127.0.0.1:port/v1",
        "http://127.0.0.1/v1\r\nX: y",
        "http://127.0.0.1/ v1",
        "http://[::1",
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(served: Served, url: str) -> None:
    assert "http:// or https://" in refusal(served.endpoint(base_url=url)).replace("\n", " ")
    assert not served.requests


def test_a_model_without_name_and_a_key_that_is_none_are_refused(served: Served) -> None:
    assert "name of a model" in refusal(served.endpoint(model=" "))
    with pytest.raises(LongCatError, match="line breaks") as caught:
        ask(served.endpoint(key="se\ncret"))
    assert "cret" not in str(caught.value).replace("secret", "")
    assert not served.requests


@pytest.mark.parametrize("prompt", ["red", "红", "a 红 b", "かな", "한국어", "", "々〆", "\u4e00", "\u9fff", "\ua000"])
def test_the_language_is_upstreams_choice_unless_it_is_chosen(prompt: str) -> None:
    assert rewriting.language_of(prompt) == get_prompt_language(prompt)
    for language in (rewriting.ENGLISH, rewriting.CHINESE):
        assert rewriting.language_of(prompt, language) == language


def test_braces_in_a_prompt_stay() -> None:
    assert rewriting.question("{0} {} {x}").endswith("\nUser Input: {0} {} {x}\nRewritten prompt:")
