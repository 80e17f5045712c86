"""A package behind OpenAI's API on as many machines as a Ray cluster has, where prompts and tokens scale apart.

    serve run examples.serving.app:build package=/models/out prefill=2 decode=2
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "What is a B-tree?"}]}'

Gateway is the app of `popcompile serve`. A replica of Prefill encodes a prompt, with what it holds of its beginning,
and one of Decode answers it, in a batch with others. Keys and values go from one to the other as one array in Ray's
object store, not through the gateway: on the same machine Decode reads it where Prefill put it. Where a replica dies,
its requests start again on others, which compute the same tokens, and go on where their clients are. Needs
"popcompile[serve]" and "ray[serve]".
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

import popcompile
from popcompile.package.configs import load_tokenizer
from popcompile.package.manifest import read_manifest
from popcompile.serving.answer import Piece
from popcompile.serving.app import create_app
from popcompile.serving.errors import ApiError
from popcompile.serving.prefilling import Encoded, Packed, Prefiller
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.prompts import Prompts
from popcompile.serving.sampling import Sampling
from popcompile.serving.scheduler import Scheduler

#: how often a request starts again, while replicas die on it
ATTEMPTS = 5
#: answers that are computed at once in a replica of Decode
PLACES = 16


@serve.deployment(max_ongoing_requests=1, health_check_period_s=2)
class Prefill:
    """Encodes prompts, one at a time, with all the cores of a replica."""

    def __init__(self, package: str, provider: str, threads: int, prefix_cache_mb: int) -> None:
        model = popcompile.load(package, provider=provider, threads=threads)
        self._prefiller = Prefiller(model, PrefixCache(prefix_cache_mb << 20))

    def encode(self, inputs: Mapping[str, Tensor]) -> Packed:
        return self._prefiller.encode(inputs).packed()


@serve.deployment(max_ongoing_requests=PLACES, health_check_period_s=2)
class Decode:
    """Answers prompts that were encoded. Replicas on a machine share the mapped weights file, with those of Prefill."""

    def __init__(self, package: str, provider: str, threads: int) -> None:
        self._model = popcompile.load(package, provider=provider, threads=threads)
        self._scheduler = Scheduler(self._model, load_tokenizer(Path(package), self._model.manifest), PLACES)

    async def generate(self, packed: Packed, samplings: Sequence[Sampling]) -> AsyncGenerator[tuple[int, Piece], None]:
        async with aclosing(self._scheduler.answers(self._unpack(packed), samplings)) as pieces:
            async for piece in pieces:
                yield piece

    def _unpack(self, packed: Packed) -> Iterator[Encoded]:
        """Encoding's only step here, which the scheduler does where it is the request's turn."""
        yield packed.unpacked(self._model)


class Replicas:
    """Answers prompts with both, as popcompile's own engine does on one machine."""

    places = PLACES

    def __init__(self, prefill: DeploymentHandle, decode: DeploymentHandle) -> None:
        self._prefill, self._decode = prefill, decode.options(stream=True)

    async def generate(
        self, inputs: Mapping[str, Tensor], samplings: Sequence[Sampling]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        samplings = [sampling if sampling.seed is not None else _seeded(sampling) for sampling in samplings]
        given = [0] * len(samplings)
        for _ in range(ATTEMPTS):
            pieces = self._decode.generate.remote(self._prefill.encode.remote(inputs), samplings)
            known = list(given)
            try:
                async for index, piece in pieces:
                    if known[index]:
                        known[index] -= 1
                        continue
                    given[index] += 1
                    yield index, piece
                return
            except (RayActorError, ObjectLostError, RayServeException):  # the last where Prefill's replica dies
                continue
            except (GeneratorExit, asyncio.CancelledError):  # the client has gone
                pieces.cancel()
                raise
        raise ApiError(503, f"{ATTEMPTS} replicas died on this request; ask again later")


def _seeded(sampling: Sampling) -> Sampling:
    """For an answer that may start again, and has to be the same."""
    return replace(sampling, seed=secrets.randbits(62))


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress()
class Gateway:
    """Takes requests over HTTP; those that no replica is free for wait here."""

    def __init__(self, package: str, prefill: DeploymentHandle, decode: DeploymentHandle) -> None:
        self._folder, self._replicas = Path(package), Replicas(prefill, decode)

    def __serve_build_asgi_app__(self) -> FastAPI:
        prompts = Prompts(self._folder, read_manifest(self._folder))
        return create_app(self._folder.name, prompts, self._replicas)


def build(options: dict[str, str]) -> serve.Application:
    """`serve run`'s arguments: package; prefill and decode, replicas of each (1); threads of each replica (1); provider
    (cpu); prefix_cache_mb of each replica of Prefill (512).
    """
    package, provider = options["package"], options.get("provider", "cpu")
    threads, megabytes = int(options.get("threads", 1)), int(options.get("prefix_cache_mb", 512))
    resources = {"num_cpus": threads} if provider == "cpu" else {"num_gpus": 1}
    prefill = Prefill.options(num_replicas=int(options.get("prefill", 1)), ray_actor_options=resources)
    decode = Decode.options(num_replicas=int(options.get("decode", 1)), ray_actor_options=resources)
    gateway = Gateway.options(ray_actor_options={"num_cpus": 0})
    return gateway.bind(
        package, prefill.bind(package, provider, threads, megabytes), decode.bind(package, provider, threads)
    )
