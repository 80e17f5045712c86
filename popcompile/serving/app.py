"""The HTTP API: OpenAI's chat completions, completions and models, over anything that answers prompts."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, format_sse_event
from openai.types import Model
from pydantic import BaseModel
from torch import Tensor

from popcompile.serving.answer import Piece
from popcompile.serving.engine import Generator
from popcompile.serving.errors import ApiError, add_handlers, error_json
from popcompile.serving.limits import BodyLimit, RequestLimit
from popcompile.serving.merging import merged
from popcompile.serving.prompts import Prompts
from popcompile.serving.requests import ChatRequest, CompletionRequest, Request
from popcompile.serving.responses import ChatForm, CompletionForm, Form, Tally, model_card
from popcompile.serving.sampling import Sampling

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
#: of a request, in bytes
BODY_BYTES = 100 * 2**20
#: the status of an answer that nobody reads any more, as web servers log it
_GONE = 499


@dataclass(frozen=True)
class Job:
    """A prompt that is to be answered, as often as there are samplings."""

    inputs: dict[str, Tensor]
    samplings: Sequence[Sampling]


def create_app(name: str, prompts: Prompts, generator: Generator, max_requests: int | None = None) -> FastAPI:
    """The app. name: of the one model that there is. max_requests: that are answered or wait; more are refused."""
    app = FastAPI(title="popcompile", openapi_url=None)
    app.add_middleware(BodyLimit, limit=BODY_BYTES)
    if max_requests is not None:
        app.add_middleware(RequestLimit, limit=max_requests)
    add_handlers(app)
    created = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HTTPRequest) -> Response:
        _require_model(body.model, name)
        jobs = _jobs(body, [await prompts.of_messages(body.messages)], prompts)
        return await _answered(http, body, jobs, generator, ChatForm(name, body.includes_usage))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HTTPRequest) -> Response:
        _require_model(body.model, name)
        jobs = _jobs(body, [await prompts.of_prompt(prompt) for prompt in body.prompts], prompts)
        return await _answered(http, body, jobs, generator, CompletionForm(name, body.includes_usage))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name, created).to_dict()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Model:
        _require_model(model, name)
        return model_card(name, created)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def _require_model(given: str | None, name: str) -> None:
    if given is not None and given != name:
        raise ApiError(404, f"the model {given!r} is not here; use {name!r}", "model", "model_not_found")


def _jobs(body: Request, inputs: Sequence[dict[str, Tensor]], prompts: Prompts) -> list[Job]:
    """All prompts of a request, each for n answers. Raises ApiError where one has no room."""
    return [Job(prompt, body.samplings(prompts.room(prompt, body.limit))) for prompt in inputs]


async def _answered(http: HTTPRequest, body: Request, jobs: list[Job], generator: Generator, form: Form) -> Response:
    prompt = sum(job.inputs["input_ids"].shape[1] for job in jobs)
    tally = Tally(prompt, sum(len(job.samplings) for job in jobs))
    if body.stream:
        events = _events(_pieces(jobs, generator, tally), form, tally)
        return EventSourceResponse(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    if not await _unless_gone(http, _exhaust(_pieces(jobs, generator, tally))):
        return Response(status_code=_GONE)
    return Response(_json(form.whole(tally)), media_type="application/json")


async def _pieces(jobs: Sequence[Job], generator: Generator, tally: Tally) -> AsyncGenerator[tuple[int, Piece], None]:
    """The answers' pieces as they come, each with its answer's index. Of a long list no more prompts are asked at once
    than have a place, so that other requests do not wait for all of it.
    """
    n = len(jobs[0].samplings)
    streams = (generator.generate(job.inputs, job.samplings) for job in jobs)
    async with aclosing(merged(streams, max(1, generator.places // n))) as pieces:
        async for prompt, (answer, piece) in pieces:
            index = prompt * n + answer
            tally.note(index, piece, is_first=answer == 0)
            yield index, piece


async def _events(
    pieces: AsyncGenerator[tuple[int, Piece], None], form: Form, tally: Tally
) -> AsyncGenerator[bytes, None]:
    """A request's answers as server-sent events. What fails once they have begun is an event too."""
    opened: set[int] = set()
    try:
        async with aclosing(pieces):
            async for index, piece in pieces:
                if index not in opened:
                    opened.add(index)
                    for chunk in form.opening(index):
                        yield _event(_json(chunk))
                if piece.text:
                    yield _event(_json(form.chunk(index, piece.text)))
                if piece.finish is not None:
                    yield _event(_json(form.chunk(index, None, piece.finish)))
        for chunk in form.closing(tally):
            yield _event(_json(chunk))
    except Exception as error:
        if not isinstance(error, ApiError):
            _LOG.exception("an answer failed while it was streamed")
        yield _event(json.dumps(error_json(error)))
    yield _event("[DONE]")


async def _exhaust(pieces: AsyncGenerator[tuple[int, Piece], None]) -> bool:
    """Run to the end; True."""
    async with aclosing(pieces):
        async for _ in pieces:
            pass
    return True


async def _unless_gone(http: HTTPRequest, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What `work` returns; None where the client leaves before, which ends the work."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(data: str) -> bytes:
    return format_sse_event(data_str=data)


def _json(answer: BaseModel) -> str:
    return answer.model_dump_json(exclude_unset=True, warnings=False)
