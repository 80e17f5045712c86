"""Shared by tests of the runtime and of generation: real packages beside transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers import logging as transformers_logging

from popcompile.runtime.generation import PopCache, load

#: fp32 kernels of two libraries over 18 to 30 layers; logits and cache entries are of the order of 10
TOLERANCE = 1e-3


class Pair:
    """A package and the checkpoint that it was made of."""

    def __init__(self, package: Path, checkpoint: Path) -> None:
        transformers_logging.disable_progress_bar()
        self.package = package
        self.model = load(package)
        self.reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    @property
    def pruned(self) -> list[int]:
        return self.model.manifest.pruned

    @property
    def window(self) -> int:
        return self.model.manifest.window

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def tokens(self, length: int, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randint(5, 40_000, (1, length), generator=random)


@pytest.fixture(scope="module")  # and no longer: each holds a model in fp32
def smollm2(smollm2_package: Path, smollm2_checkpoint: Path) -> Pair:
    return Pair(smollm2_package, smollm2_checkpoint)


@pytest.fixture(scope="module")
def gemma(gemma_package: Path, gemma_checkpoint: Path) -> Pair:
    return Pair(gemma_package, gemma_checkpoint)


def tolerance(expected: Tensor) -> float:
    """Rounding of other kernels: relative to the largest value, which Gemma has at 100 in logits and keys."""
    return max(TOLERANCE, 5e-5 * float(expected.abs().max()))


def assert_same_cache(cache: PopCache, expected: DynamicCache, row: int = 0) -> None:
    length = cache.kv.lengths[row]
    for index, tensor in enumerate(cache.kv.tensors()):
        layer = expected.layers[index // 2]
        other = layer.keys if index % 2 == 0 else layer.values
        assert other is not None and other.shape[2] == length
        assert (tensor[row, :, :length] - other[0]).abs().max() < tolerance(other), f"layer {index // 2}"
