"""A package behind one HTTP endpoint, on as many machines as a Ray cluster has.

    serve run examples.serving.app:build package=/models/out replicas=2
    curl -N localhost:8000/generate -H "Content-Type: application/json" -d '{"prompt": "What is a B-tree?"}'

Ray Serve starts replicas, restarts those that die, and routes requests to those that are free; a replica answers one
request at a time, with all of its cores. A request whose replica dies goes to another one, unless text of it has been
sent. Needs popcompile and "ray[serve]".
"""

import itertools
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer, TextIteratorStreamer

import popcompile

#: replicas that a request is given to, one after the other, while they die on it
ATTEMPTS = 5
app = FastAPI()


class Request(BaseModel):
    """A user's message. Decoding is greedy, so that a request that starts again gives the same text."""

    prompt: str
    max_new_tokens: int = Field(default=128, ge=1)


@serve.deployment(max_ongoing_requests=1, health_check_period_s=2)
class Model:
    """One replica: the package in a process of its own. Replicas on a machine share the mapped weights file."""

    def __init__(self, package: str, provider: str, threads: int) -> None:
        self._model = popcompile.load(package, provider=provider, threads=threads)
        self._tokenizer = AutoTokenizer.from_pretrained(package, trust_remote_code=False, local_files_only=True)
        self._name = f"{serve.get_replica_context().replica_tag}, process {os.getpid()}"

    def generate(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """This replica's name, with the first token, and then the text as it comes."""
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        left, failed = threading.Event(), list[Exception]()

        def run() -> None:
            try:
                self._model.generate(
                    **self._encoded(prompt), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), left.is_set())],
                )  # fmt: skip
            except Exception as error:
                failed.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            first = next(streamer, "")
            if failed:
                raise failed[0]
            yield self._name
            yield from (text for text in itertools.chain([first], streamer) if text)
        finally:  # also where the client has gone
            left.set()
            thread.join()

    def _encoded(self, prompt: str) -> Any:
        if not self._tokenizer.chat_template:
            return self._tokenizer(prompt, return_tensors="pt")
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


async def _in_bytes(texts: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for text in texts:
        yield text.encode()


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(app)
class Gateway:
    """Takes requests over HTTP; those that no replica is free for wait here."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model.options(stream=True)

    @app.post("/generate")
    async def generate(self, request: Request) -> StreamingResponse:
        """The answer as a stream of text. The header X-Replica names the replica that it comes from."""
        for _ in range(ATTEMPTS):
            texts = self._model.generate.remote(request.prompt, request.max_new_tokens)
            try:
                replica = await anext(texts)
            except RayActorError:
                continue
            except popcompile.PopcompileError as error:
                raise HTTPException(400, str(error.args[0] if error.args else error)) from error
            return StreamingResponse(_in_bytes(texts), media_type="text/plain", headers={"X-Replica": replica})
        raise HTTPException(503, f"{ATTEMPTS} replicas died on this request")


def build(options: dict[str, str]) -> serve.Application:
    """`serve run`'s arguments: package, replicas (1), threads of each (1), provider (cpu)."""
    threads, provider = int(options.get("threads", 1)), options.get("provider", "cpu")
    resources = {"num_cpus": threads} if provider == "cpu" else {"num_gpus": 1}
    model = Model.options(num_replicas=int(options.get("replicas", 1)), ray_actor_options=resources)
    return Gateway.options(ray_actor_options={"num_cpus": 0}).bind(model.bind(options["package"], provider, threads))
