"""The importance estimator against one written with transformers' modules and hooks, and `popcompile analyze`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import save_model
from canonical import CONFIGS, LAYERS, canonical
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from popcompile.cli import main
from popcompile.package.report import Importance
from popcompile.passes.printing import print_graph
from popcompile.pruning.analyze import importance_rows
from popcompile.pruning.importance import importance, prefix_lengths, random_stream
from popcompile.pruning.rows import Rows
from popcompile.pruning.sampling import random_starts
from popcompile.report.plots import importance_svg

TEXTS, LENGTH, PREFIXES = 5, 12, 3


def texts(seed: int = 0) -> Tensor:
    return torch.randint(64, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(seed))


def measure(family: str, **options: Any) -> Importance:
    model, program = canonical(family)
    return importance(program, model.state_dict().__getitem__, Rows(texts()), **{"prefixes": PREFIXES, **options})


# --- against transformers --------------------------------------------------------------------------------------


def residual_modules(model: PreTrainedModel, per: str) -> list[list[torch.nn.Module]]:
    """By layer, the modules whose output a gate scales: the layer itself, or what it adds to the residual stream."""
    layers = list(model.model.layers)
    if per == "layer":
        return [[layer] for layer in layers]
    if hasattr(layers[0], "post_feedforward_layernorm"):
        return [[layer.post_attention_layernorm, layer.post_feedforward_layernorm] for layer in layers]
    return [[layer.self_attn, layer.mlp] for layer in layers]


def gate_hook(gate: Tensor, per: str) -> Callable[..., Any]:
    """Scale what a module adds by a gate of every token, [sequence, 1]."""

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        added = output[0] if isinstance(output, tuple) else output
        scaled = inputs[0] + gate * (added - inputs[0]) if per == "layer" else gate * added
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    return hook


def reference_squares(model: PreTrainedModel, text: Tensor, per: str, random: torch.Generator) -> Tensor:
    """Squared derivatives [layers, blocks, 2] for one text and one label, from transformers' modules."""
    modules = residual_modules(model, per)
    gates = torch.ones(len(modules), len(modules[0]), len(text), requires_grad=True)
    handles = [
        module.register_forward_hook(gate_hook(gates[i, j][:, None], per))
        for i, layer in enumerate(modules)
        for j, module in enumerate(layer)
    ]
    try:
        log_p = model(input_ids=text[None], use_cache=False).logits[0, -1].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    label = torch.multinomial(log_p.detach().exp(), 1, generator=random)[0]
    (gradient,) = torch.autograd.grad(log_p[label], gates)
    return torch.stack((gradient[..., :-1].sum(-1), gradient[..., -1]), -1).double() ** 2


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("per", ["layer", "block"])
def test_importance_is_the_reference(family: str, per: str) -> None:
    model, _ = canonical(family)
    found = measure(family, per=per, seed=3)
    random = torch.Generator().manual_seed(random_stream(3, "labels"))
    lengths = prefix_lengths(LENGTH, PREFIXES)
    squares = [[reference_squares(model, text[:n], per, random) for n in lengths] for text in texts()]
    by_text = torch.stack([torch.stack(of_text).mean(0) for of_text in squares]).flatten(1, -2)
    error = by_text.std(0) / math.sqrt(TEXTS)
    for k, stage in enumerate(("prefill", "decode")):
        # fp32 gradients through another order of summation, squared
        torch.testing.assert_close(getattr(found, stage), by_text.mean(0)[:, k].tolist(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(getattr(found, f"{stage}_error"), error[:, k].tolist(), rtol=1e-3, atol=1e-6)
    blocks = 1 if per == "layer" else 2
    assert found.prefill[-blocks:] == [0.0] * blocks and min(found.prefill[:-blocks]) > 1e-4
    assert found.blocks == (() if per == "layer" else ("attention", "mlp"))


def test_the_seed_repeats_it_and_another_changes_it() -> None:
    first, again, other = measure("gemma3", seed=1), measure("gemma3", seed=1), measure("gemma3", seed=2)
    assert first == again
    assert first.decode != other.decode


def test_the_program_and_the_weights_are_left_alone() -> None:
    model, program = canonical("llama")
    before = print_graph(program.graphs["model"])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():  # as sampled text is made
        sampled = texts().clone()
    importance(program, model.state_dict().__getitem__, Rows(sampled))
    assert list(program.graphs) == ["model"] and print_graph(program.graphs["model"]) == before
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())


def test_progress_counts_every_prefix() -> None:
    seen: list[tuple[int, int]] = []
    measure("llama", progress=lambda *n: seen.append(n))
    assert seen == [(i + 1, TEXTS * PREFIXES) for i in range(TEXTS * PREFIXES)]


@pytest.mark.parametrize(
    ("length", "count", "lengths"),
    [(192, 4, [96, 128, 160, 192]), (12, 1, [12]), (5, 8, [2, 3, 4, 5]), (3, 8, [2, 3]), (2, 8, [2])],
)
def test_prefix_lengths(length: int, count: int, lengths: list[int]) -> None:
    assert prefix_lengths(length, count) == lengths


def test_a_single_text_has_no_standard_error() -> None:
    model, program = canonical("llama")
    found = importance(program, model.state_dict().__getitem__, Rows(texts()[:1]), prefixes=1)
    rows = importance_rows(found)
    assert len(rows) == LAYERS and all(row["prefill_error"] is row["decode_error"] is None for row in rows)
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("family", CONFIGS)
def test_two_tokens_are_enough(family: str) -> None:
    model, program = canonical(family)
    found = importance(program, model.state_dict().__getitem__, Rows(texts()[:, :2]))
    assert all(math.isfinite(value) and value > 0 for value in (*found.prefill[:-1], *found.decode))


# --- starts of sampled texts -----------------------------------------------------------------------------------


@pytest.mark.real
def test_starts_are_ordinary_tokens(smollm2_checkpoint: Path, gemma_checkpoint: Path) -> None:
    """Gemma's tokenizer adds BOS by itself, SmolLM2's does not."""
    for folder, first in ((smollm2_checkpoint, []), (gemma_checkpoint, [2])):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        starts = random_starts(tokenizer, tokenizer.vocab_size, 200, seed=5)
        assert [start.tolist()[:-1] for start in starts] == [first] * 200
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        assert special and not special & {int(start[-1]) for start in starts}
        assert len({int(start[-1]) for start in starts}) > 190
        assert all(map(torch.equal, starts, random_starts(tokenizer, tokenizer.vocab_size, 200, seed=5)))


def test_starts_without_a_tokenizer_are_any_token() -> None:
    starts = random_starts(None, 7, 300, seed=0)
    assert {tuple(start.tolist()) for start in starts} == {(i,) for i in range(7)}


# --- the command -----------------------------------------------------------------------------------------------


def popcompile(*arguments: object) -> str:
    """stdout of popcompile in a process of its own."""
    command = [sys.executable, "-m", "popcompile", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


#: prefill/decode importance of layers 20 to 28 together at most, of layers 4 to 19 at least; with 6 texts of 64 tokens
#: 0.069 and 1.10 were measured with seed 0, 0.063 and 1.50 with seed 1
DEEP_RATIO, SHALLOW_RATIO = 0.25, 0.5


@pytest.mark.real
def test_analyze_smollm2(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    """What the paper shows: prefill needs the deep layers far less than decode does, and the last one not at all."""
    plot = tmp_path / "importance.svg"
    options = ("--texts", 3, "--tokens", 64, "--json", "--plot", plot)
    found = json.loads(popcompile("analyze", smollm2_checkpoint, *options))
    assert found["model"] == str(smollm2_checkpoint) and found["seconds"] > 0
    assert (found["texts"], found["tokens"], found["seed"], found["per"]) == (3, 64, 0, "layer")
    layers = found["layers"]
    assert [row["layer"] for row in layers] == list(range(30))
    assert set(layers[0]) == {"layer", "prefill", "decode", "prefill_error", "decode_error"}
    assert layers[29]["prefill"] == layers[29]["prefill_error"] == 0.0 and layers[29]["decode"] > 0
    assert all(row["prefill"] > 0 for row in layers[:29])

    def ratio(chosen: range) -> float:
        return sum(layers[i]["prefill"] for i in chosen) / sum(layers[i]["decode"] for i in chosen)

    assert ratio(range(20, 29)) < DEEP_RATIO
    assert ratio(range(4, 20)) > SHALLOW_RATIO
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_table_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    outputs = []
    for seed in (0, 0, 1):
        assert main(["analyze", str(model), "--texts", "3", "--tokens", "8", "--seed", str(seed)]) == 0
        outputs.append(capsys.readouterr().out.splitlines())
    table, footer = outputs[0][:4], outputs[0][-1]
    assert table[0].split() == ["layer", "prefill", "decode", "prefill/decode"]
    assert table[3].split()[:2] == ["1", "0"] and table[3].split()[-1] == "0"
    assert footer.startswith(f"{model}: 3 texts of 8 tokens, seed 0, ") and "standard error" in footer
    assert outputs[1][:4] == table != outputs[2][:4]


def test_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plot = save_model(tmp_path / "model"), tmp_path / "plot.png"
    options = ["--texts", "2", "--tokens", "8", "--per", "block"]
    assert main(["analyze", str(model), *options, "--json", "--plot", str(plot)]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [(row["layer"], row["block"]) for row in rows] == [(i, b) for i in (0, 1) for b in ("attention", "mlp")]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["analyze", str(model), *options]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["layer", "block"]


# --- the plot --------------------------------------------------------------------------------------------------

SHOWN = Importance([0.5, 0.01, 0.0], [1.0, 0.2, 3.0], [0.1, 0.02, 0.0], [0.3, 0.1, 1.0])


def test_svg_is_an_element_and_the_same_every_time() -> None:
    svg = importance_svg(SHOWN, pruned=[1, 2])
    root = ElementTree.fromstring(svg)
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    for expected in ("prefill", "decode", "prefill: exactly 0", "pruned in prefill", "layer", "importance"):
        assert expected in words
    assert "decode: exactly 0" not in words
    assert svg == importance_svg(SHOWN, pruned=[1, 2]) and "<dc:date>" not in svg
    assert "pruned" not in importance_svg(SHOWN)


@pytest.mark.parametrize(
    "odd",
    [
        replace(SHOWN, prefill=[0.0] * 3, decode=[0.0] * 3),
        replace(SHOWN, prefill_error=[math.nan] * 3, decode_error=[math.nan] * 3),
        Importance([0.0], [1e-30], [0.0], [0.0]),
    ],
)
def test_svg_of_odd_numbers(odd: Importance) -> None:
    ElementTree.fromstring(importance_svg(odd, pruned=[0]))
