"""Any prune set, on both real models: prefill.onnx against the reference written from transformers' modules.

The package's weights serve every prune set, so a variant is the same package with another prefill.onnx.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import pop_prefill
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from popcompile.evaluation.compare import evaluate
from popcompile.package.manifest import REPORT
from popcompile.runtime.session import Runtime
from popcompile.runtime.verify import verify
from popcompile.variants import Variants

#: DESIGN and the issue that asked for this: fp32 rounding through 30 layers stays below
pytestmark = pytest.mark.real
TOLERANCE = 1e-3


def assert_close(runtime: Runtime, model: PreTrainedModel, pruned: list[int], lengths: tuple[int, ...]) -> None:
    """Logits and all caches of a prompt, and of a second one after it, for several prompt lengths."""
    for length in lengths:
        random = torch.Generator().manual_seed(length)
        cache, expected_cache = runtime.new_cache(1), DynamicCache()
        for tokens in (length, 12):
            ids = torch.randint(5, 40000, (1, tokens), generator=random)
            logits = runtime.feed([ids[0]], cache, "prefill")
            expected, expected_cache = pop_prefill(model, ids, pruned, expected_cache, window=runtime.manifest.window)
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
            held = [t[:, :, : cache.lengths[0]] for t in cache.tensors()]
            wanted = [t for layer in expected_cache.layers for t in (layer.keys, layer.values)]
            for one, other in zip(held, wanted, strict=True):
                torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


SMOLLM2_SETS = {"empty": [], "last layer": [29], "scattered": [3, 4, 11, 17, 20, 21, 22, 28]}
GEMMA_SETS = {"last layer": [17], "scattered": [2, 5, 6, 11, 13, 14, 16]}


@pytest.fixture(scope="module")
def smollm2(smollm2_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gemma(gemma_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(gemma_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def smollm2_variants(smollm2_package: Path) -> Variants:
    return Variants(smollm2_package)


@pytest.fixture(scope="module")
def gemma_variants(gemma_package: Path) -> Variants:
    return Variants(gemma_package)


@pytest.mark.parametrize("kind", SMOLLM2_SETS)
def test_smollm2_prune_sets(kind: str, smollm2_variants: Variants, smollm2: PreTrainedModel, tmp_path: Path) -> None:
    pruned = SMOLLM2_SETS[kind]
    runtime = Runtime(smollm2_variants.prune(tmp_path / "variant", pruned))
    assert_close(runtime, smollm2, pruned, (2, 17, 300))
    if kind != "scattered":
        _assert_equals_full_model(runtime, smollm2, atol=1e-4)


@pytest.mark.parametrize("kind", GEMMA_SETS)
def test_gemma_prune_sets(kind: str, gemma_variants: Variants, gemma: PreTrainedModel, tmp_path: Path) -> None:
    pruned = GEMMA_SETS[kind]
    runtime = Runtime(gemma_variants.prune(tmp_path / "variant", pruned))
    assert_close(runtime, gemma, pruned, (2, 17, 700))
    if kind != "scattered":
        # matrix products of one row and of 64 add up in another order: 1.4e-4 was seen
        _assert_equals_full_model(runtime, gemma, atol=3e-4)


def _assert_equals_full_model(runtime: Runtime, model: PreTrainedModel, atol: float) -> None:
    """Nothing reads the last layer's output for a context token, so pruning it, or nothing, changes no logit."""
    ids = torch.randint(5, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    logits = runtime.feed([ids[0]], runtime.new_cache(1), "prefill")
    full = runtime.feed([ids[0]], runtime.new_cache(1), "decode")
    torch.testing.assert_close(logits, full, atol=atol, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, -1:], atol=TOLERANCE, rtol=0)


def test_a_calibrated_package_beats_the_papers(unified_package: Path) -> None:
    """Measured on prose that calibration has not seen, beside the layers' own projections.

    With the default of 104 texts and 128 steps KL is a fourth of the paper's (popcompile/README.md); here it is quick.
    """
    frontier = json.loads((unified_package / REPORT).read_text())["choice"]["frontier"]
    assert [row["refined"] for row in frontier] == [True, False]
    assert frontier[0]["loss"]["first_token_kl"] < frontier[1]["loss"]["first_token_kl"]
    found = evaluate(
        unified_package, prompts=6, prompt_tokens=128, continuation_tokens=16, baselines=True, greedy_prompts=0
    )
    ours = found["texts"]["prose"]
    papers = found["baselines"]["layer"]["prose"]
    for metric in ("first_token_kl_mean", "continuation_kl_mean"):
        assert 0 < ours[metric]["value"] < 0.7 * papers[metric]["value"]
    assert abs(ours["perplexity_ratio"]["value"] - 1) < papers["perplexity_ratio"]["value"] - 1
    assert len(verify(unified_package)) == 4
