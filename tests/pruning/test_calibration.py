"""The closed-form fit against numpy's least squares on transformers' own activations, and the parts that it runs on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import Traced
from conftest import materialise, tiny_gemma3, tiny_llama, tiny_moe, transformers_forward
from reference import Map
from torch import Tensor
from transformers import PreTrainedModel

from popcompile.errors import PopcompileError
from popcompile.pruning import hidden_states
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import Keys, LayerwiseModel
from popcompile.pruning.regression import AffineMap, Calibration, calibrate, own_projection
from popcompile.pruning.rows import Rows

LAYERS = 6
CONFIGS = {
    "llama": tiny_llama(num_hidden_layers=LAYERS, attention_bias=True),
    "gemma3": tiny_gemma3(num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 3),
    "qwen3_moe": tiny_moe(num_hidden_layers=LAYERS),
}
#: two runs, each followed by a kept layer
PRUNED = [1, 2, 4]
#: more rows of activations than hidden size (32), fewer tokens than positions (32)
ROWS, LENGTH = 30, 14


@cache
def traced(family: str) -> Traced:
    return Traced.of(CONFIGS[family])


@cache
def text() -> Tensor:
    return torch.randint(64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


@cache
def states(family: str, folder: Path) -> HiddenStates:
    return HiddenStates(traced(family).layers, Rows(text()), 1, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


# --- the reference -----------------------------------------------------------------------------------------------


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(
    model: PreTrainedModel, replace: dict[int, Tensor] | None = None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What layers read [N, T, hidden], by layer, with the last one's output; and what k_proj and v_proj return.

    replace: hidden states that layers read instead of their own.
    """
    inputs: dict[int, Tensor] = {}
    projected: dict[str, Tensor] = {}

    def enter(index: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = (replace or {}).get(index, args[0])
            inputs[index] = x
            return (x, *args[1:])

        return hook

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            projected[name] = output

        return hook

    def leave(module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        inputs[len(layers)] = output[0] if isinstance(output, tuple) else output

    layers = list(model.model.layers)
    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(leave))
    for i, layer in enumerate(layers):
        for name in ("k_proj", "v_proj"):
            handles.append(getattr(layer.self_attn, name).register_forward_hook(keep(f"{name}{i}")))
    with hooks(*handles):
        model(input_ids=text(), use_cache=False)
    return inputs, {i: torch.cat((projected[f"k_proj{i}"], projected[f"v_proj{i}"]), -1) for i in range(len(layers))}


def own_map(model: PreTrainedModel, layer: int) -> np.ndarray:
    """[hidden + 1, keys + values] from the layer's weights: its norm's scale, k_proj and v_proj."""
    module = model.model.layers[layer]
    scale = module.input_layernorm.weight.detach().double()
    scale = scale + 1 if "Gemma" in type(module).__name__ else scale
    columns = []
    for name in ("k_proj", "v_proj"):
        projection = getattr(module.self_attn, name)
        bias = projection.bias.detach() if projection.bias is not None else torch.zeros(projection.out_features)
        columns.append(torch.cat(((projection.weight.detach().double() * scale).T, bias.double()[None])))
    return torch.cat(columns, -1).numpy()


def least_squares(x: Tensor, target: Tensor, ridge: float, prior: np.ndarray | None) -> Map:
    """argmin |[x / rms(x), 1] W - target|^2 + ridge |W - prior|^2 without first tokens, and the first tokens' mean.

    x [N, T, hidden], target [N, T, out]. The penalty is a row of data per row of W; the bias' is a millionth.
    """
    inputs = x[:, 1:].double().flatten(0, 1).numpy()
    inputs = inputs / np.sqrt((inputs**2).mean(1, keepdims=True) + 1e-6)
    strength = ridge * (inputs**2).sum(0).mean()
    penalty = np.sqrt(strength) * np.eye(inputs.shape[1] + 1)
    penalty[-1, -1] *= 1e-3
    inputs = np.concatenate((inputs, np.ones((len(inputs), 1))), 1)
    wanted = target[:, 1:].double().flatten(0, 1).numpy()
    prior = np.zeros((inputs.shape[1], wanted.shape[1])) if prior is None else prior
    stacked = np.concatenate((inputs, penalty)), np.concatenate((wanted, penalty @ prior))
    solved = torch.from_numpy(np.linalg.lstsq(*stacked, rcond=None)[0]).float()
    return Map(solved[:-1].T, solved[-1], target[:, 0].mean(0))


def assert_map(ours: AffineMap, theirs: Map, tolerance: float) -> None:
    for kind in ("weight", "bias", "sink"):
        a, b = getattr(ours, kind), getattr(theirs, kind)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, k=kind: f"{k}: {m}")


#: activations come in fp32 from other kernels, and the fit divides by what is as small as ridge; weights are up to 3
FIT = 2e-4


# --- the fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
@pytest.mark.parametrize("family", CONFIGS)
def test_calibrate_is_least_squares(family: str, ridge: float, folder: Path) -> None:
    model = traced(family).model
    found = calibrate(states(family, folder), PRUNED, ridge=ridge)
    assert set(found.projections) == {2, 4}  # layer 1 reads what it always did: its own projection is exact
    assert set(found.bypasses) == {1, 4}
    whole, projected = activations(model)
    assert_map(found.projections[2], least_squares(whole[1], projected[2], ridge, own_map(model, 2)), FIT)
    bypass = least_squares(whole[1], whole[3] - whole[1], ridge, None)
    assert_map(found.bypasses[1], bypass, FIT)
    # front to back: layer 3 reads what the first run's bypass makes, and the second run sees what comes of it
    positions = torch.arange(LENGTH)[None]
    pruned, _ = activations(model, replace={3: whole[1] + bypass.apply(whole[1], positions)})
    assert (pruned[4] - whole[4]).abs().max() > 0.1
    assert_map(found.projections[4], least_squares(pruned[4], projected[4], ridge, own_map(model, 4)), FIT)
    assert_map(found.bypasses[4], least_squares(pruned[4], whole[5] - pruned[4], ridge, None), FIT)


def test_without_bypass_the_cut_goes_on(folder: Path) -> None:
    model = traced("llama").model
    found = calibrate(states("llama", folder), PRUNED, bypass=False, ridge=1e-2)
    assert not found.bypasses
    whole, projected = activations(model)
    pruned, _ = activations(model, replace={3: whole[1]})
    assert_map(found.projections[4], least_squares(pruned[4], projected[4], 1e-2, own_map(model, 4)), FIT)


def test_the_last_run_has_no_bypass(folder: Path) -> None:
    """Nothing reads its output."""
    found = calibrate(states("llama", folder), [3, 4, 5])
    assert set(found.projections) == {4, 5} and not found.bypasses
    assert calibrate(states("llama", folder), []) == Calibration()
    assert calibrate(states("llama", folder), [5]) == Calibration()


@pytest.mark.parametrize("family", CONFIGS)
def test_strong_ridge_gives_the_own_projection(family: str, folder: Path) -> None:
    # the bias is penalised a millionth as much
    found = calibrate(states(family, folder), PRUNED, ridge=1e12)
    for layer, ours in found.projections.items():
        own = torch.from_numpy(own_map(traced(family).model, layer)).float()
        torch.testing.assert_close(ours.weight, own[:-1].T, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.bias, own[-1], rtol=0, atol=1e-4)
    for bypass in found.bypasses.values():
        assert bypass.weight.abs().max() < 1e-6


@pytest.mark.parametrize("family", CONFIGS)
def test_own_projection_is_read_off_the_layer(family: str) -> None:
    for layer in range(LAYERS):
        own = torch.from_numpy(own_map(traced(family).model, layer))
        # fp32 activations, up to 10; the norm's eps
        torch.testing.assert_close(own_projection(traced(family).layers, layer), own, rtol=0, atol=1e-4)


def test_first_tokens_make_the_sinks_and_nothing_else(tmp_path: Path) -> None:
    """Their hidden states are replaced by outliers: sinks follow, weights and biases do not."""
    before = HiddenStates(traced("llama").layers, Rows(text()), 1, tmp_path)
    plain = calibrate(before, [1, 2])
    for layer in range(1, LAYERS + 1):
        before.before(layer)[:, 0] *= 1000
    outliers = calibrate(before, [1, 2])
    for ours, theirs in (
        (outliers.projections[2], plain.projections[2]),
        (outliers.bypasses[1], plain.bypasses[1]),
    ):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    # the bypass' is the mean step over the run, a thousand times as long
    torch.testing.assert_close(outliers.bypasses[1].sink, 1000 * plain.bypasses[1].sink, rtol=1e-4, atol=1e-3)


def test_a_map_is_applied_from_position_0(folder: Path) -> None:
    found = calibrate(states("llama", folder), [1, 2]).bypasses[1]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    ours = found(x)
    torch.testing.assert_close(ours, Map(found.weight, found.bias, found.sink).apply(x, torch.arange(5)[None]))
    assert torch.equal(ours[:, 0], found.sink.expand(2, -1))


def test_constants_have_the_passes_names(folder: Path) -> None:
    found = calibrate(states("llama", folder), PRUNED)
    constants = found.constants()
    program = traced("llama").prune(PRUNED, found)
    graph = program.graphs["prefill"]
    parameters = {str(n.target): n.meta["val"] for n in graph.graph.nodes if n.op == "get_attr"}
    assert set(constants) == {name for name in parameters if name.startswith(("kv_projection.", "bypass."))}
    assert all(parameters[name].shape == tensor.shape for name, tensor in constants.items())
    assert Calibration().constants() == {}


# --- the whole model's hidden states -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 5 * LENGTH, 2560])
@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_are_transformers(
    family: str, batch_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any batches: of one row, of five with a rest, of all."""
    monkeypatch.setattr(hidden_states, "_BATCH_TOKENS", batch_tokens)
    seen: list[tuple[int, int]] = []
    found = HiddenStates(traced(family).layers, Rows(text()), 2, tmp_path, lambda *n: seen.append(n))
    batches = {1: ROWS, 5 * LENGTH: 6, 2560: 1}[batch_tokens]
    total = batches * LAYERS
    assert seen == [(n + 1, total) for n in range(total)]
    whole, _ = activations(traced(family).model)
    for layer in range(2, LAYERS + 1):
        # other kernels; the stream is up to 30
        torch.testing.assert_close(found.before(layer), whole[layer], rtol=0, atol=1e-4)


def test_hidden_states_leave_no_file(tmp_path: Path) -> None:
    """They lie in a file without a name, which goes with the process."""
    found = HiddenStates(traced("llama").layers, Rows(text()), 3, tmp_path)
    assert list(tmp_path.iterdir()) == []
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        lines = [line for line in mapped.read_text().splitlines() if str(tmp_path) in line]
        assert len(lines) == LAYERS + 1 - 3 and all(line.endswith("(deleted)") for line in lines)
    assert found.before(3).abs().max() > 0


def test_nan_weights_name_the_layer(tmp_path: Path) -> None:
    source = traced("llama")
    weights = dict(source.model.state_dict())
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name] = torch.full_like(weights[name], float("nan"))
    damaged = LayerwiseModel(materialise(source.program.graphs["model"], source.program, weights))
    with pytest.raises(PopcompileError, match=r"^layer 2 computes NaN or infinity .* fix it, or convert with"):
        HiddenStates(damaged, Rows(text()), 4, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- layer by layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_layer_by_layer_is_the_model(family: str) -> None:
    """At once, and with the first 9 tokens as keys; the window of 8 is shorter than the text."""
    layers, ids = traced(family).layers, text()[:3]
    logits, kv = transformers_forward(traced(family).model, ids)
    positions = torch.arange(LENGTH).expand(3, -1)
    tokens = layers.tokens(Rows(ids), positions)
    causal = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool).tril()
    x = layers.embed(tokens)
    inputs = []
    for layer in range(layers.num_layers):
        inputs.append(x)
        x = layers.layer(layer, x, tokens, causal)
    torch.testing.assert_close(layers.logits(x, tokens), logits, rtol=0, atol=1e-4)  # other kernels; up to 10
    early, late = (layers.tokens(Rows(ids), positions[:, part]) for part in (slice(9), slice(9, None)))
    y = layers.embed(late)
    for layer in range(layers.num_layers):
        context = inputs[layer][:, :9]
        entries = layers.cache_entries(layer, *layers.project(layer, context, early), early)
        for ours, theirs in zip(entries, kv[2 * layer : 2 * layer + 2], strict=True):
            torch.testing.assert_close(ours, theirs[:, :, :9], rtol=0, atol=1e-4)
        y = layers.layer(layer, y, late, causal[:, 9:], Keys(*entries, positions[:, :9]))
    torch.testing.assert_close(layers.logits(y, late), logits[:, 9:], rtol=0, atol=1e-4)


# --- memory ------------------------------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from calibrated import Traced
from conftest import tiny_llama
from popcompile.pruning.regression import calibrate
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.refinement import refine
from popcompile.pruning.rows import Rows

def fit(count):
    rows = torch.randint(64, (count, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = HiddenStates(layers, Rows(rows), 1, Path(sys.argv[1]))
        refine(states, [1, 3], calibrate(states, [1, 3]), steps=2)
    return states

layers = Traced.of(tiny_llama(num_hidden_layers=4)).layers
fit(160)
status = dict(line.split(":") for line in open("/proc/self/status"))
data = 1024 * int(status["VmData"].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (data + 50_000_000, resource.RLIM_INFINITY))
print(sum(4 * states.numel() for states in fit(10_000)._states))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """150 MB of hidden states within 50 MB more than a small text takes."""
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 150_000_000
