"""RoPE of the type longrope, as Phi-3-128k and Phi-4-mini have it: two sets of frequencies, chosen by the length.

transformers takes the long ones for a call with a position beyond the length of pretraining, for all of its tokens;
keys that the cache holds stay as they were rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_inputs, materialise, run_graph, tiny_llama, tiny_model, transformers_forward
from families import pop_by_hooks
from transformers import DynamicCache, Phi3Config, PreTrainedConfig

import popcompile
from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, canonicalization, ops
from popcompile.passes.graph import find, shape_of
from popcompile.runtime.session import Runtime

#: tokens of pretraining
ORIGINAL = 16
_ROPE = {"rope_type": "longrope", "rope_theta": 1e4}


def _factors(pairs: int) -> dict[str, list[float]]:
    return {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [2 + 0.7 * i for i in range(pairs)]}


def phi3(partial: float = 1.0) -> Phi3Config:
    return Phi3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, original_max_position_embeddings=ORIGINAL,
        rope_parameters=_ROPE | _factors(int(8 * partial)) | {"partial_rotary_factor": partial},
        partial_rotary_factor=partial, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Phi-3-128k": phi3,
    "Phi-4-mini": lambda: phi3(0.5),
    "Llama, a factor": lambda: tiny_llama(
        rope_parameters=_ROPE | _factors(8) | {"original_max_position_embeddings": ORIGINAL, "factor": 4.0}
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def canonical(request: pytest.FixtureRequest) -> Any:
    model = tiny_model(CONFIGS[request.param]())
    program = trace(model.config)
    PassManager(canonicalization()).run(program)
    return model, program, materialise(program.graphs["model"], program, model.state_dict())


@pytest.mark.parametrize("past", [0, 1, 10, ORIGINAL, 20])
@pytest.mark.parametrize("length", [1, 6, 7])
def test_graph(canonical: Any, past: int, length: int) -> None:
    """Logits and cache before, at and beyond the length of pretraining, in one call and in two."""
    model, _, graph = canonical
    inputs = make_inputs(model, [length], past=past)
    logits, cache = run_graph(graph, inputs)
    expected, theirs = transformers_forward(model, inputs.ids, inputs.cache(0) if past else None)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for ours, other in zip(cache, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_tables(canonical: Any) -> None:
    """One node for each rotation, over tables with a part for either set of frequencies."""
    model, program, _ = canonical
    rotations = find(program.graphs["model"], op=ops.rotary_embedding)
    assert len(rotations) == 4
    assert {shape_of(n.args[2])[0] for n in rotations} == {2 * model.config.max_position_embeddings}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("longrope")
    model = tiny_model(phi3(0.5))
    model.save_pretrained(folder / "model")
    popcompile.convert(folder / "model", folder / "out", layers="0", kv_projection="layer", window=4)
    return model, Runtime(folder / "out")


IDS = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("turns", [(12, 15), (10, 30), (30, 36)], ids=["short", "crossing", "long"])
def test_package(package: Any, turns: tuple[int, int]) -> None:
    """A pruned prompt and another one after it."""
    model, runtime = package
    first, second = turns
    cache, theirs = runtime.new_cache(1), DynamicCache()
    for ids in (IDS[:, :first], IDS[:, first:second]):
        expected, theirs = pop_by_hooks(model, ids, [0], theirs, window=4)
        torch.testing.assert_close(runtime.feed([ids[0]], cache, "prefill"), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch(package: Any) -> None:
    """A row that is short by itself takes the frequencies of the longest one, as in transformers."""
    model, runtime = package
    rows = [IDS[0, :20], IDS[0, 20:27]]
    padded, mask = torch.zeros(2, 20, dtype=torch.int64), torch.ones(2, 20, dtype=torch.int64)
    padded[0], padded[1, 13:], mask[1, :13] = rows[0], rows[1], 0
    expected = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1:]
    logits = runtime.feed(rows, runtime.new_cache(2), "decode")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    alone = model(rows[1][None]).logits[:, -1]
    assert (logits[1] - alone).abs().max() > 0.01
