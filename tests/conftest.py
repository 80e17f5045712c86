"""Shared by tests: tiny models whose weights matter, and running a graph of a compiled program in PyTorch.

`pytest --update-graphs` rewrites the expected texts in tests/passes/graphs; read the diff before you commit it.
"""

from __future__ import annotations

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; read once, when PyTorch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cli, popcompile, save_model
from filelock import FileLock
from image_attention_reference import gemma3
from random_weights import randomize
from torch import Tensor, fx
from traced_once import remembering, remembering_parts
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from vision_checkpoint import save_gemma_checkpoint, save_vision_checkpoint, vision_model
from vision_reference import random_model

from popcompile.conversion import convert
from popcompile.frontend import tracing
from popcompile.frontend.samples import sample_checkpoint, sample_model
from popcompile.passes import Program
from popcompile.pruning import execution
from popcompile.vision import tracing as vision_tracing

#: what else has fixtures
pytest_plugins = ("gguf_files", "pairs", "served", "vision")
#: for what tests run in processes of their own
_TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (_TESTS, _TESTS / "support")))


def pytest_configure() -> None:
    """Collections look at every object of torch and transformers: by default that is 6% of the tests' time."""
    gc.set_threshold(50_000, 10, 10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-graphs", action="store_true", help="rewrite the expected texts in tests/passes/graphs")


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_traced", remembering(tracing._traced))
        patch.setattr(vision_tracing, "_traced", remembering_parts(vision_tracing._traced))
        yield


# --- tiny models -----------------------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip


def tiny_llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**_SIZES | changes)


def tiny_gemma3(**changes: object) -> Gemma3TextConfig:
    """Sliding and full attention with RoPE bases of their own, q and k norms, tied embeddings."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    gemma = {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 8, "query_pre_attn_scalar": 8}
    return Gemma3TextConfig(**_SIZES | gemma | changes)


def tiny_moe(**changes: object) -> Qwen3MoeConfig:
    """Two of four experts in each layer, q and k norms."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    return Qwen3MoeConfig(**_SIZES | experts | changes)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own module with random weights."""
    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(config).eval())


# --- running graphs --------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """Right-padded prompts after a past, of one length unless there is one new token; slot j holds position j."""

    ids: Tensor  # [batch, sequence]
    mask: Tensor  # [batch, total]
    past: list[Tensor]  # key and value of every layer [batch, kv_heads, past, head]
    lengths: Sequence[int]  # new tokens of every row

    @property
    def valid_slots(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def cache(self, row: int) -> DynamicCache:
        """The past of one row, for transformers."""
        cache, past = DynamicCache(), self.valid_slots[row] - self.lengths[row]
        for i in range(len(self.past) // 2):
            key, value = (t[row : row + 1, :, :past] for t in self.past[2 * i : 2 * i + 2])
            cache.update(key, value, i)
        return cache


def make_inputs(model: PreTrainedModel, lengths: Sequence[int], past: int = 0, seed: int = 0) -> Inputs:
    """Random prompts of `lengths` tokens, padded on the right, after `past` random tokens."""
    config = model.config
    random = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    ids = torch.randint(config.vocab_size, (batch, past + longest), generator=random)
    mask = (torch.arange(past + longest)[None] < past + torch.tensor(lengths)[:, None]).long()
    empty = torch.zeros(batch, config.num_key_value_heads, 0, config.head_dim)
    tensors = [empty] * (2 * config.num_hidden_layers)
    if past:
        tensors = transformers_forward(model, ids[:, :past])[1]
    return Inputs(ids[:, past:], mask, tensors, lengths)


@torch.no_grad()
def transformers_forward(
    model: PreTrainedModel, ids: Tensor, cache: DynamicCache | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits of every token and the cache after them, from transformers' module."""
    cache = cache if cache is not None else DynamicCache()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits, cache_tensors(cache)


def cache_tensors(cache: DynamicCache) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def materialise(gm: fx.GraphModule, program: Program, weights: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of the graph with the tensors of a state dict."""
    return execution.materialise(gm, program, weights.__getitem__)


@torch.no_grad()
def run_graph(gm: fx.GraphModule, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Logits and cache of a materialised graph."""
    logits, *cache = gm(inputs.ids, inputs.mask, *inputs.past)
    return logits, cache


# --- tiny packages ---------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return Cli(capsys, tmp_path)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package, made as a user does; nothing else is printed or left. Taken from the environment while developing."""

    def make(folder: Path) -> None:
        parent = tmp_path_factory.mktemp("packages")
        done = popcompile("convert", tiny_checkpoint, parent / "out", "--prune", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{parent / 'out'}: 2 layers, prefill skips 1 (1)")
        assert done.stdout.count("\n") == 4
        assert [path.name for path in parent.iterdir()] == ["out"]
        (parent / "out").rename(folder)

    return _once("tiny", "POPCOMPILE_TEST_TINY", tmp_path_factory, make)


@pytest.fixture(scope="session")
def vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL."""
    return save_vision_checkpoint(vision_model(), tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def package(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy of the tiny package, to be damaged."""
    return Path(shutil.copytree(tiny_package, tmp_path / "out"))


# --- packages that take longer ---------------------------------------------------------------------------------

#: a window that most prompts of the tests are longer than
THIRD = {"prune": "1/3", "kv_projection": "layer", "window": 8}


def _package(name: str, variable: str, model: Path, factory: pytest.TempPathFactory, **options: Any) -> Path:
    return _once(name, variable, factory, lambda folder: convert(model, folder, **options))


def _once(name: str, variable: str, factory: pytest.TempPathFactory, make: Callable[[Path], object]) -> Path:
    """A package, made once for all of pytest-xdist's workers, all of it or nothing; taken from the environment while
    developing.
    """
    if ready := os.environ.get(variable):
        return Path(ready)
    run = factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "packages"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not (folder / name).is_dir():
            make(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def vision_package(vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 3 and 4 of 6 pruned, with their own weights, and a window of 2."""
    options = {"layers": "3-4", "kv_projection": "layer", "window": 2}
    return _package("vision", "POPCOMPILE_TEST_VISION", vision_checkpoint, tmp_path_factory, **options)


@pytest.fixture(scope="session")
def unified_vision_package(vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and layers in the other layout."""
    variable, options = "POPCOMPILE_TEST_UNIFIED_VISION", {"layers": "3-4", "kv_projection": "layer", "window": 2}
    return _package("unified-vision", variable, vision_checkpoint, tmp_path_factory, layout="unified", **options)


@pytest.fixture(scope="session")
def gemma_vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma-3 with images, which see all of themselves."""
    return save_gemma_checkpoint(random_model(gemma3()), tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="session")
def gemma_vision_package(gemma_vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned are sliding layers, one of which a full layer follows, and the window of 6 may begin inside an image."""
    options = {"layers": "1,3", "kv_projection": "layer", "window": 6}
    return _package(
        "gemma-vision", "POPCOMPILE_TEST_GEMMA_VISION", gemma_vision_checkpoint, tmp_path_factory, **options
    )


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder, in the cache folder that tests share."""
    return sample_checkpoint("smollm2")


@pytest.fixture(scope="session")
def gemma_checkpoint() -> Path:
    """Gemma-3-270M as a transformers folder, in the cache folder that tests share."""
    return sample_checkpoint("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _package("smollm2", "POPCOMPILE_TEST_SMOLLM2", sample_model("smollm2"), tmp_path_factory, **THIRD)


@pytest.fixture(scope="session")
def unified_package(smollm2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in one graph, calibrated: quickly, with a few texts and steps."""
    few = {"calibration_texts": 12, "refinement_steps": 3}
    variable, options = "POPCOMPILE_TEST_UNIFIED", {"layers": "20-29", "layout": "unified", "window": 1, **few}
    return _package("unified", variable, smollm2_checkpoint, tmp_path_factory, **options)


@pytest.fixture(scope="session")
def gemma_package(gemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _package("gemma", "POPCOMPILE_TEST_GEMMA", gemma_checkpoint, tmp_path_factory, **THIRD)
