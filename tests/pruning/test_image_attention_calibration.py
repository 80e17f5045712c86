"""Calibration of a decoder whose tokens of an image see all of it: layers run one by one are those of the graph.

The model is Gemma-3's text decoder, whose sliding layers see fewer tokens than an image has.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import image_attention_reference as reference
import pytest
import torch
from compiled_decoder import CompiledDecoder, difference, empty_cache, run_decoder
from image_attention_reference import IMAGE, IMAGE_TOKENS, Image, embeddings_of, gemma3, make_prompt
from torch import Tensor

from popcompile.passes import Program
from popcompile.pruning import layerwise
from popcompile.pruning.execution import materialise
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.pruned_prefill import Prompts, last_hidden_state
from popcompile.pruning.regression import Calibration
from popcompile.pruning.rows import ImageTokens, Rows, decoder_inputs
from popcompile.pruning.sampling import sample
from popcompile.vision.tracing import build_model, trace_images

GEMMA = CompiledDecoder(gemma3())
PROMPT = make_prompt([3, Image(), 2, Image()])
TOLERANCE = 1e-4


@cache
def program() -> Program:
    found = GEMMA.canonical.clone()
    found.add(trace_images(build_model(deepcopy(GEMMA.config))))
    return found


def weight(name: str) -> Tensor:
    return GEMMA.model.state_dict()[name]


@cache
def layers() -> LayerwiseModel:
    graph = materialise(program().graphs["model"], program(), weight)
    return LayerwiseModel(graph, decoder_inputs(program(), weight))


def rows_of(prompt: reference.Prompt, room: int = 0) -> Rows:
    """The prompt, and so many tokens of text behind it."""
    ids = torch.cat((prompt.ids, torch.zeros(1, room, dtype=torch.int64)), 1)
    image, wide = (ids == IMAGE), embeddings_of(GEMMA.model, prompt)
    index = torch.where(image, image.cumsum(1) - 1, -1)
    features = wide[prompt.types.bool()]
    return Rows(ids, ImageTokens(features, index, torch.empty(0, *ids.shape, dtype=torch.int64)))


@pytest.mark.parametrize("queries", [5, 192])
@torch.no_grad()
def test_layer_by_layer_is_the_model(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a block of queries ends within an image."""
    monkeypatch.setattr(layerwise, "_QUERIES", queries)
    states = HiddenStates(layers(), rows_of(PROMPT), 0)
    tokens = states.tokens(slice(0, 1))
    logits = layers().logits(states.before(layers().num_layers), tokens)
    assert difference([logits], [reference.full_logits(GEMMA.model, PROMPT)]) < TOLERANCE
    assert difference([logits], [reference.full_logits(GEMMA.model, PROMPT, causal=True)]) > 0.01


@pytest.mark.parametrize("window", [1, 9, 17])
@torch.no_grad()
def test_pruned_prefill_before_it_is_compiled_is_the_graph(window: int) -> None:
    """The tail is the end of an image, or all of it and a mark. A block beside it changes nothing."""
    rows, pruned = rows_of(PROMPT), (1, 3)
    wide, count = embeddings_of(GEMMA.model, PROMPT), rows.length - window
    inputs = [wide, torch.ones_like(rows.ids), *empty_cache(GEMMA.canonical)]
    expected, _ = run_decoder(GEMMA.graph("prefill", pruned, window), inputs)
    x = layers().embed(layers().tokens(rows, rows.slots))
    for probed in (rows.slots[:, :0], rows.slots[:, 2:8]):
        positions = torch.cat((rows.slots[:, count:], probed), 1)
        begins = torch.cat((torch.full((1, window), count), torch.full_like(probed, 2)), 1)
        prompts = Prompts.of(layers(), rows, count, positions, begins)
        entering = (x[:, :count], x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2])))
        y = last_hidden_state(layers(), prompts, entering, 0, list(pruned), Calibration())
        assert difference([layers().logits(y, prompts.tail)[:, window - 1]], [expected[:, 0]]) < TOLERANCE


@torch.no_grad()
def test_a_loss_of_nothing_pruned_is_nothing() -> None:
    """Wherever windows begin: blocks of a tail see what the whole model does, but of images that they begin in."""
    prompt = make_prompt([3, Image(), 30, Image(), 12])
    rows = rows_of(prompt)
    for window in (1, 4, 20):
        loss = HeldOut(layers(), rows, 0, rows.length - 6, 0, window).measure([], Calibration())
        assert max(loss.first_token_kl, loss.kl) < 1e-6 and loss.ppl_ratio == pytest.approx(1, abs=1e-4)


def test_images_are_sampled_behind_at_once() -> None:
    """The likeliest token that follows; with images run token by token another would."""
    prompts = [make_prompt([1, Image(), 1, Image(), 1], seed) for seed in range(24)]
    differing = 0
    for prompt in prompts:
        rows, count = rows_of(prompt, room=1), prompt.ids.shape[1]
        graph = materialise(program().graphs["model"], program(), weight)
        inputs = decoder_inputs(program(), weight)
        drawn = sample(graph, rows, [count], seed=0, inputs=inputs, temperatures=[1e-5])
        likely = reference.full_logits(GEMMA.model, prompt)[0, -1].argmax()
        assert drawn.ids[0, -1] == likely
        differing += bool(reference.full_logits(GEMMA.model, prompt, causal=True)[0, -1].argmax() != likely)
    assert differing, "some causal prompt goes on otherwise"


def test_the_ends_of_images() -> None:
    rows = rows_of(PROMPT)
    first = range(4, 4 + IMAGE_TOKENS)
    assert rows.image_ends is not None and rows.ids[0, 3] != IMAGE
    expected = [first[-1] if slot in first else slot for slot in range(first.stop + 1)]
    assert rows.image_ends[0, : first.stop + 1].tolist() == expected
    assert rows.image_ends[0, -IMAGE_TOKENS:].tolist() == [rows.length - 1] * IMAGE_TOKENS
    assert Rows(rows.ids).image_ends is None
