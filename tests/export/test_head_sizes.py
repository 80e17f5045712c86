"""Heads of sizes that the attention kernels refuse: padded, exactly; or refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_gemma3, tiny_llama, tiny_model
from families import pop_by_hooks
from transformers import DynamicCache, PreTrainedConfig, Qwen3Config

import popcompile
from popcompile.errors import PopcompileError
from popcompile.runtime.session import Runtime

IDS = torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(0))


def _qwen3() -> Qwen3Config:
    """Norms of queries and keys, over the features that they have."""
    return Qwen3Config(**tiny_llama(head_dim=100).to_diff_dict() | {"model_type": "qwen3"})


#: config, and the head size of its package
CASES: dict[str, tuple[Callable[[], PreTrainedConfig], int]] = {
    "12": (lambda: tiny_llama(head_dim=12), 16),
    "20, windows and norms": (lambda: tiny_gemma3(head_dim=20), 24),
    "100, norms": (_qwen3, 104),
}


@pytest.mark.parametrize("case", CASES)
def test_against_transformers(case: str, tmp_path: Path) -> None:
    """A pruned prompt, one after it, and a batch of unequal prompts."""
    make, head_size = CASES[case]
    model = tiny_model(make())
    model.save_pretrained(tmp_path / "model")
    manifest = popcompile.convert(
        tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", layout="unified", window=3
    )
    assert manifest.head_size == head_size
    runtime = Runtime(tmp_path / "out")
    cache, theirs = runtime.new_cache(1), DynamicCache()
    for ids in (IDS[:, :14], IDS[:, 14:22], IDS[:, 22:23]):
        expected, theirs = pop_by_hooks(model, ids, [1], theirs, window=3)
        torch.testing.assert_close(runtime.feed([ids[0]], cache, "prefill"), expected, rtol=1e-4, atol=1e-4)
    key = cache.tensors()[0]
    assert key.shape[3] == head_size and not key[..., model.config.head_dim :].any()
    rows = [IDS[0, :12], IDS[0, 12:17]]
    logits = runtime.feed(rows, runtime.new_cache(2), "prefill")
    for row, prompt in enumerate(rows):
        expected, _ = pop_by_hooks(model, prompt[None], [1], window=3)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_too_large_for_the_provider(tmp_path: Path) -> None:
    """Known from the config, before anything is written or calibrated."""
    model: Any = tiny_model(tiny_llama(head_dim=264))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        PopcompileError, match="heads have 264 features, and ONNX Runtime's attention takes at most 256"
    ):
        popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", provider="cuda")
    assert not (tmp_path / "out").exists()
