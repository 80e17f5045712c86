"""Shared by tests of serving: packages to serve, and OpenAI's own client in the server's process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from bad_input import save_model, save_tokenizer
from conftest import tiny_gemma3, tiny_llama, tiny_model
from openai import AsyncOpenAI
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.conversion import convert
from popcompile.package.configs import load_tokenizer
from popcompile.runtime.generation import PopForCausalLM, load
from popcompile.serving.app import create_app
from popcompile.serving.engine import Engine
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.prompts import Prompts

T = TypeVar("T")
NAME = "tiny"
#: tokens, of which most prompts of the tests have more
WINDOW = 4


class Served:
    """A package, and how to talk to it as a server would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: PopForCausalLM = load(folder, threads=1)
        self.prompts = Prompts(folder, self.model.manifest)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)

    def serially(self, prompt: str | list[int], new_tokens: int, **settings: Any) -> list[int]:
        """The answer's tokens, by the model alone. settings: of `generate`, and a seed."""
        ids = self.ids(prompt)
        torch.manual_seed(settings.pop("seed", 0))
        settings = {"do_sample": False, "max_new_tokens": new_tokens} | settings
        return self.model.generate(ids, **settings)[0, ids.shape[1] :].tolist()

    def ids(self, prompt: str | list[int]) -> Tensor:
        if isinstance(prompt, list):
            return torch.tensor([prompt])
        return torch.tensor([self.tokenizer(prompt)["input_ids"]])

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def engine(self, *, max_concurrent: int = 16, prefixes: PrefixCache | None = None, chunk: int = 0) -> Engine:
        return Engine(self.model, self.tokenizer, max_concurrent=max_concurrent, prefixes=prefixes, chunk=chunk)

    def note_calls(self, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
        """New tokens of every row, of each call of the model's graphs from now on."""
        calls: list[list[int]] = []
        feed = self.model.runtime.feed

        def noted(rows: Any, *rest: Any, **options: Any) -> Any:
            calls.append([len(row) for row in rows])
            return feed(rows, *rest, **options)

        monkeypatch.setattr(self.model.runtime, "feed", noted)
        return calls

    @asynccontextmanager
    async def http(self, engine: Engine | None = None) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(NAME, self.prompts, engine or self.engine())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server/v1") as client:
            yield client

    def ask(self, questions: Callable[[AsyncOpenAI], Awaitable[T]], engine: Engine | None = None) -> T:
        """What `questions` returns, which is given OpenAI's client."""

        async def run() -> T:
            async with self.http(engine) as http:
                client = AsyncOpenAI(api_key="none", base_url="http://server/v1", http_client=http, max_retries=0)
                return await questions(client)

        return asyncio.run(run())


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The first of two layers pruned, so that what it would have computed for context tokens matters to the second."""
    return serve_pruned(save_model(tmp_path_factory.mktemp("served") / "model", max_position_embeddings=512))


@pytest.fixture(scope="session")
def sliding_served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Windows of 8 tokens, shorter than what prompts share, and a pruned sliding layer below a full one."""
    folder = tmp_path_factory.mktemp("sliding") / "model"
    tiny_model(tiny_gemma3(max_position_embeddings=512)).save_pretrained(folder)
    return serve_pruned(folder)


@pytest.fixture(scope="session")
def longrope_served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Phi-3's RoPE, with other frequencies beyond 16 tokens."""
    folder = tmp_path_factory.mktemp("longrope") / "model"
    factors = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.7 * i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
    tiny_model(tiny_llama(rope_parameters=rope | factors, max_position_embeddings=512)).save_pretrained(folder)
    return serve_pruned(folder)


def serve_pruned(model: Path) -> Served:
    """A checkpoint with its first layer pruned, converted beside it. It gets a tokenizer where it has none."""
    if not (model / "tokenizer.json").exists():
        save_tokenizer(model, 64)
    convert(model, model.with_name(NAME), layers="0", kv_projection="layer", window=WINDOW)
    return Served(model.with_name(NAME))
