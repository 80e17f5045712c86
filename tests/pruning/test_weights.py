"""A model whose weights are read a layer at a time calibrates as one that is held in memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from calibrated import Traced
from conftest import Cli, save_model, tiny_gemma3, tiny_llama
from torch import Tensor
from words import save_words

from popcompile.errors import PopcompileError
from popcompile.package.manifest import REPORT
from popcompile.pruning import execution, weights
from popcompile.pruning.execution import bytes_in_fp32, computing_in_fp32, fast_products, parameter_reader
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.refinement import refine
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.rows import Rows
from popcompile.pruning.weights import StreamedWeights, room_for_weights

LAYERS, FIRST, PRUNED = 6, 2, [2, 3, 5]
CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=LAYERS),
    "tied": tiny_llama(num_hidden_layers=LAYERS, tie_word_embeddings=True),
    # embeddings are scaled, and a window is shorter than the text
    "gemma3": tiny_gemma3(num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 3),
}


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest) -> Traced:
    return Traced.of(CONFIGS[request.param])


def rows(count: int, seed: int) -> Rows:
    return Rows(torch.randint(64, (count, 28), generator=torch.Generator().manual_seed(seed)))


def streaming(source: Traced, room: int, reads: Counter[str] | None = None) -> LayerwiseModel:
    """reads: counts what is read."""
    tensors = source.model.state_dict()

    def read(name: str) -> Tensor:
        if reads is not None:
            reads[name] += 1
        return tensors[name]

    graph = computing_in_fp32(source.program.graphs["model"])
    return LayerwiseModel(graph, weights=StreamedWeights(parameter_reader(source.program, read), room))


def maps(calibration: Calibration) -> list[Tensor]:
    return [getattr(m, kind) for m in calibration.projections.values() for kind in ("weight", "bias", "sink")]


@torch.no_grad()
def fitted(model: LayerwiseModel, folder: Path) -> tuple[list[Tensor], list[float]]:
    """Maps in closed form and refined, and what they lose."""
    states = HiddenStates(model, rows(12, 1), FIRST, folder)
    held_out = HeldOut(model, rows(4, 2), FIRST, 22, seed=0, window=3)
    plain = calibrate(states, PRUNED)
    with fast_products():
        refined = refine(states, PRUNED, plain, steps=3)
    losses = [held_out.measure(PRUNED, found) for found in (Calibration(), plain, refined)]
    return [*maps(plain), *maps(refined)], [loss.kl for loss in losses] + [loss.first_token_kl for loss in losses]


@pytest.mark.parametrize("rounds", [False, True])
def test_the_same_maps_and_losses(
    source: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: bool
) -> None:
    """With no room at all every weight is read for each node that wants it. Also on a CPU with bf16 units."""
    monkeypatch.setattr(execution, "rounds_in_avx512", lambda: rounds)
    expected, losses = fitted(source.layers, tmp_path)
    found, ours = fitted(streaming(source, room=0), tmp_path)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert ours == pytest.approx(losses, rel=1e-4)


@torch.no_grad()
def test_a_text_takes_each_layer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches it has. Of the embedding rows are read, batch by batch."""
    monkeypatch.setattr("popcompile.pruning.hidden_states._BATCH_TOKENS", 56)
    reads: Counter[str] = Counter()
    layer = sum(p.nbytes for n, p in Traced.of(CONFIGS["llama"]).model.named_parameters() if ".layers.0." in n)
    states = HiddenStates(streaming(Traced.of(CONFIGS["llama"]), 2 * layer, reads), rows(12, 1), FIRST, tmp_path)
    assert len(list(states.batches())) == 6
    layered = {name: count for name, count in reads.items() if ".layers." in name}
    assert len(layered) == 9 * LAYERS and set(layered.values()) == {1}


def test_room_is_kept_to() -> None:
    tensors = {name: torch.ones(10, 10, dtype=torch.bfloat16) for name in "abc"}
    reads: list[str] = []
    kept = StreamedWeights(lambda name: reads.append(name) or tensors[name], room=800)
    for name in "abacab":
        assert kept[name].dtype == torch.float32
    assert reads == ["a", "b", "c", "b"], "two fit, and the one that was read longest ago goes"
    assert kept.embeddings("a", torch.tensor([[3, 4]])).dtype == torch.float32


@torch.no_grad()
def test_gradients_hold_no_weights(tmp_path: Path) -> None:
    """A layer's weights are gone when the next one is run, and read again on the way back."""
    reads: Counter[str] = Counter()
    model = streaming(Traced.of(CONFIGS["llama"]), 0, reads)
    states = HiddenStates(model, rows(12, 1), FIRST, tmp_path)
    plain = calibrate(states, PRUNED)
    name = "model.layers.4.mlp.up_proj.weight"
    before = reads[name]
    refine(states, PRUNED, plain, steps=1)
    assert reads[name] - before == 2


def test_what_fits_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Traced.of(CONFIGS["llama"]).program
    needed = bytes_in_fp32(program)

    def room(free: int, sampled: bool = False) -> int | None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        return room_for_weights(program, "model", sampled)

    assert room(needed) is None and room(needed, sampled=True) is None
    assert room(needed - 4) == (needed - 4) // 4
    with pytest.raises(PopcompileError, match=r"^model: to sample text from it .* give --calibration FILE"):
        room(needed - 4, sampled=True)
    with pytest.raises(PopcompileError, match=r"^model: to choose layers .* give --kv-projection layer"):
        room(1000)


@pytest.mark.parametrize(("limit", "bound"), [("2000000000", True), ("max", False), ("9223372036854771712", False)])
def test_a_container_bounds_what_is_free(
    limit: str, bound: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(limit + "\n")
    monkeypatch.setattr(weights, "_LIMITS", (tmp_path / "limit", tmp_path / "of another version"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10))
    taken = psutil.Process().memory_info().rss
    assert weights.free_memory() == (pytest.approx(2 * 10**9 - taken, rel=0.1) if bound else 10**10)


def test_conversion(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On text from a file: the same report whether the model fits or not."""
    model = save_model(tmp_path / "model", num_hidden_layers=6, max_position_embeddings=96)
    text = save_words(tmp_path / "words.txt", 0, 4000)
    asked = ["--layers", "3-5", "--calibration", text, "--calibration-texts", "8", "--refinement-steps", "2"]
    losses = []
    for out in ("held", "streamed"):
        status, _, errors = cli.run("convert", model, tmp_path / out, *asked)
        assert status == 0, errors
        quality = json.loads((tmp_path / out / REPORT).read_text())["quality"]["loss"]
        losses.append({name: value for name, value in quality.items() if value is not None})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200_000))
    assert losses[0]["kl"] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    line = cli.refuses("convert", model, tmp_path / "out", "--layers", "3-5")
    assert "to sample text from it takes 0.0 GB of memory" in line
