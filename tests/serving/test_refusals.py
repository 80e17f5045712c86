"""What cannot be answered is refused in OpenAI's form, with its status and the field's name, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai.types.shared import ErrorObject
from served import NAME, Served
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from popcompile.serving import app
from popcompile.serving.limits import RequestLimit
from popcompile.serving.requests import UNSUPPORTED

USER = {"role": "user", "content": "the cat"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

#: path, body, status, field, a part of the message
BAD: dict[str, tuple[str, Any, int, str | None, str]] = {
    "not JSON": ("completions", b'{"prompt": ', 400, None, "not JSON"),
    "nested": ("completions", b"[" * 100_000, 400, None, "parsing the body"),
    "no object": ("completions", [1], 400, None, "not a JSON object"),
    "no prompt": ("completions", {}, 400, "prompt", "required"),
    "empty prompt": ("completions", {"prompt": ""}, 400, "prompt", "empty"),
    "no prompts": ("completions", {"prompt": []}, 400, "prompt", "valid"),
    "mixed prompts": ("completions", {"prompt": [1, "x"]}, 400, "prompt.0", "valid"),
    "token ids": ("completions", {"prompt": [1, 128]}, 400, "prompt", "from 0 to 127"),
    "negative ids": ("completions", {"prompt": [[-1]]}, 400, "prompt", "from 0 to 127"),
    "half a pair": ("completions", b'{"prompt": "\\ud800"}', 400, "prompt", "valid"),
    "a word as number": ("completions", {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens", "integer"),
    "zero tokens": ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "1"),
    "temperature": ("completions", {"prompt": "x", "temperature": 3}, 400, "temperature", "2"),
    "not finite": ("completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature", "finite"),
    "top_p": ("completions", {"prompt": "x", "top_p": -1}, 400, "top_p", "0"),
    "seed": ("completions", {"prompt": "x", "seed": 2**63}, 400, "seed", "less"),
    "empty stop": ("completions", {"prompt": "x", "stop": ["a", ""]}, 400, "stop.1", "at least 1"),
    "stream_options": ("completions", {"prompt": "x", "stream_options": {}}, 400, "stream_options", "stream=true"),
    "misspelt": ("completions", {"prompt": "x", "max_token": 5}, 400, "max_token", "unknown field"),
    "other model": ("completions", {"prompt": "x", "model": "gpt"}, 404, "model", "use 'tiny'"),
    "long prompt": ("completions", {"prompt": [3] * 512}, 400, "messages", "context has 512"),
    "long answer": ("completions", {"prompt": "x", "max_tokens": 512}, 400, "max_tokens", "lower max_tokens"),
    "no messages": ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
    "role": ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'user'"),
    "no content": ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    "content": ("chat/completions", {"messages": [USER | {"content": 3}]}, 400, "messages.0.content", "valid"),
    "a file": ("chat/completions", {"messages": [USER | {"content": [{"type": "file"}]}]}, 400, "messages.0.content.0",
               "'image_url'"),
    "tool calls": ("chat/completions", {"messages": [USER | {"tool_calls": [{}]}]}, 400, "messages", "tool_calls"),
    "picture": ("chat/completions", {"messages": [USER | {"content": [PICTURE]}]}, 400, "messages", "picture"),
    "no such path": ("embeddings", {"input": "x"}, 404, None, "Not Found"),
}  # fmt: skip


async def _post(http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await http.post(f"/{path}", content=content, headers={"Content-Type": "application/json"})


def _refusal(answer: httpx.Response) -> ErrorObject:
    assert set(answer.json()) == {"error"}
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return ErrorObject.model_validate(answer.json()["error"])


@pytest.mark.parametrize("case", BAD)
def test_bad_request(case: str, served: Served) -> None:
    path, body, status, param, part = BAD[case]

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with served.http() as http:
            return await _post(http, path, body), await _post(http, "completions", {"prompt": "the", "max_tokens": 1})

    refused, after = asyncio.run(ask())
    error = _refusal(refused)
    assert (refused.status_code, error.param) == (status, param), error
    assert part in error.message and error.message == " ".join(error.message.split())
    assert error.type == "invalid_request_error" and after.status_code == 200
    assert (error.code == "context_length_exceeded") == ("long" in case)


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_field(field: str, served: Served) -> None:
    """Refused by its name where it would change the answer; null, and values that ask for nothing, are taken."""

    async def ask(value: Any) -> httpx.Response:
        async with served.http() as http:
            return await _post(http, "chat/completions", {"messages": [USER], "max_tokens": 1, field: value})

    refused = asyncio.run(ask({"some": 1}))
    assert (refused.status_code, _refusal(refused).param) == (400, field)
    assert _refusal(refused).code == "unsupported_parameter"
    for value in (None, *UNSUPPORTED[field]):
        assert asyncio.run(ask(value)).status_code == 200


def test_harmless_fields(served: Served) -> None:
    body = {
        "messages": [USER | {"name": "ada"}], "max_tokens": 1, "user": "u", "metadata": {"a": "b"}, "store": True,
        "frequency_penalty": 0.0,
    }  # fmt: skip

    async def ask() -> httpx.Response:
        async with served.http() as http:
            return await _post(http, "chat/completions", body | {"model": NAME})

    assert asyncio.run(ask()).status_code == 200


def test_wrong_method(served: Served) -> None:
    async def ask() -> tuple[httpx.Response, httpx.Response]:
        async with served.http() as http:
            return await http.get("/chat/completions"), await http.delete("/models")

    for answer in asyncio.run(ask()):
        assert answer.status_code == 405 and _refusal(answer).type == "invalid_request_error"


def test_large_body(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to be large, it is not read at all; else no further than the limit."""
    monkeypatch.setattr(app, "BODY_BYTES", 1 << 20)
    read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1 << 16
            yield b" " * (1 << 16)

    async def ask() -> None:
        nonlocal read
        async with served.http() as http:
            for headers in ({}, {"Content-Length": str(100 << 16)}):
                read = 0
                answer = await http.post("/completions", content=parts(), headers=headers)
                assert answer.status_code == 413 and "1 MB" in _refusal(answer).message
                assert read <= ((1 << 20) + (1 << 16) if not headers else 0)

    asyncio.run(ask())


def test_too_many_requests(served: Served) -> None:
    """Refused at once, while the server says that it is well."""

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app.create_app(NAME, served.prompts, served.engine(), max_requests=0))
        async with httpx.AsyncClient(transport=transport, base_url="http://server/v1") as http:
            return await http.post("/completions", json={"prompt": "x"}), await http.get("http://server/health")

    refused, health = asyncio.run(ask())
    assert refused.status_code == 503
    assert (_refusal(refused).code, _refusal(refused).type) == ("overloaded", "server_error")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_requests_count_to_their_ends() -> None:
    """Also those that fail."""
    may_end = asyncio.Event()
    status = {"/ends": 200, "/fails": 500}

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await may_end.wait()
        if scope["path"] == "/fails":
            raise ValueError
        await Response()(scope, receive, send)

    async def ask() -> None:
        transport = httpx.ASGITransport(RequestLimit(slow, 2), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            under_way = [asyncio.ensure_future(http.post(path)) for path in status]
            await asyncio.sleep(0.05)
            assert (await http.post("/ends")).status_code == 503
            may_end.set()
            assert [answer.status_code for answer in await asyncio.gather(*under_way)] == list(status.values())
            assert [(await http.post("/ends")).status_code for _ in range(3)] == [200] * 3

    asyncio.run(ask())


def test_failure_is_answered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours: with status 500, or as an event where the stream has begun."""

    async def ask(stream: bool) -> httpx.Response:
        async with served.http() as http:
            return await _post(http, "completions", {"prompt": "the", "stream": stream})

    with monkeypatch.context() as patch:
        patch.setattr(served.model.runtime, "feed", lambda *_, **__: 1 / 0)
        whole, streamed = asyncio.run(ask(False)), asyncio.run(ask(True))
    assert whole.status_code == 500 and _refusal(whole).type == "server_error"
    event, done, _ = streamed.text.split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error" and done == "data: [DONE]"
    assert asyncio.run(ask(False)).status_code == 200
