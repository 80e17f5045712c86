"""Every decoder family converts by structure alone: packages of tiny models beside transformers' own modules.

The default run prunes an inner layer and the last one of four; other sets as well are taken by
`pytest -m "slow or not slow" tests/frontend/test_families.py`. `python tests/support/family_table.py` prints the table
of passes/README.md from the results of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from families import FAMILIES, family_config, pop_by_hooks
from transformers import DynamicCache, PreTrainedModel

import popcompile
from popcompile.runtime.session import Runtime

#: of four layers
PRUNED = {"scattered": [1, 3], "the last half": [2, 3], "the last": [3], "none": []}
#: other kernels, and sums in another order; logits are up to 16
TOLERANCE = 2e-4
WINDOW = 3


@dataclass
class Family:
    model: PreTrainedModel
    runtime: Runtime
    pruned: list[int]
    ids: torch.Tensor  # [1, 40]


def _cases() -> list[Any]:
    """Families, each with every set of pruned layers; the default run takes the hardest of them."""
    return [
        pytest.param((name, pruned), id=f"{name}: {which}", marks=[] if which == "scattered" else pytest.mark.slow)
        for which, pruned in PRUNED.items()
        for name in FAMILIES
    ]


@pytest.fixture(scope="module", params=_cases())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    name, pruned = request.param
    model = tiny_model(family_config(name))
    model.save_pretrained(folder / "model")
    layers: dict[str, Any] = {"layers": ",".join(map(str, pruned))} if pruned else {"prune": 0}
    popcompile.convert(
        folder / "model", folder / "out", **layers, kv_projection="layer", layout="unified", window=WINDOW
    )
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    return Family(model, Runtime(folder / "out"), pruned, ids)


def assert_same_cache(family: Family, ours: list[torch.Tensor], theirs: DynamicCache, row: int = 0) -> None:
    """Entries that transformers keeps; of a sliding window those are the last ones."""
    for index, layer in enumerate(theirs.layers):
        for mine, other in zip(ours[2 * index : 2 * index + 2], (layer.keys, layer.values), strict=True):
            assert other is not None
            length = theirs.get_seq_length()
            kept = mine[row : row + 1, :, length - other.shape[2] : length]
            torch.testing.assert_close(kept, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 5, 30])
def test_prefill(family: Family, length: int) -> None:
    """A prompt, also one past the sliding window: the boundary token's logits and the cache."""
    ids, cache = family.ids[:, :length], family.runtime.new_cache(1)
    expected, theirs = pop_by_hooks(family.model, ids, family.pruned, window=WINDOW)
    torch.testing.assert_close(family.runtime.feed([ids[0]], cache, "prefill"), expected, atol=TOLERANCE, rtol=0)
    assert_same_cache(family, cache.tensors(), theirs)


@torch.no_grad()
def test_decode(family: Family) -> None:
    """Token by token from the first, past the sliding window, it is the full model."""
    cache = family.runtime.new_cache(1)
    expected = family.model(family.ids[:, :16]).logits
    for i in range(16):
        logits = family.runtime.feed([family.ids[0, i : i + 1]], cache, "prefill")
        torch.testing.assert_close(logits[:, 0], expected[:, i], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_batch(family: Family) -> None:
    """Prompts of unequal lengths, and a token after each."""
    rows, cache = [family.ids[0, :12], family.ids[0, 12:17]], family.runtime.new_cache(2)
    logits = family.runtime.feed(rows, cache, "prefill")
    after = family.runtime.feed([family.ids[0, 20:21]] * 2, cache, "prefill")
    for row, prompt in enumerate(rows):
        expected, theirs = pop_by_hooks(family.model, prompt[None], family.pruned, window=WINDOW)
        torch.testing.assert_close(logits[row], expected[0], atol=TOLERANCE, rtol=0)
        step = family.model(family.ids[:, 20:21], past_key_values=theirs).logits
        torch.testing.assert_close(after[row], step[0], atol=TOLERANCE, rtol=0)


def test_second_prompt(family: Family) -> None:
    """A prompt after a past, pruned as the first."""
    cache = family.runtime.new_cache(1)
    family.runtime.feed([family.ids[0, :9]], cache, "prefill")
    logits = family.runtime.feed([family.ids[0, 9:25]], cache, "prefill")
    _, theirs = pop_by_hooks(family.model, family.ids[:, :9], family.pruned, window=WINDOW)
    expected, _ = pop_by_hooks(family.model, family.ids[:, 9:25], family.pruned, theirs, window=WINDOW)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_readme_has_the_table() -> None:
    """Every family of these tests stands in it, and none else."""
    readme = (Path(__file__).parents[2] / "passes" / "README.md").read_text(encoding="utf-8")
    table = readme.partition("\n| family ")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in table] == list(FAMILIES)
    assert [row.split("|")[2].strip() for row in table] == [features for features, _, _ in FAMILIES.values()]
