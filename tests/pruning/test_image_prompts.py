"""Prompts with images, as rows, against transformers' processor and module: tokens, features, positions, answers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import vision_reference as reference
from PIL import Image
from torch import Tensor
from vision_checkpoint import MARKS
from vision_reference import IMAGE
from vision_subject import VisionSubject

from popcompile.pruning.execution import materialise
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.regression import Calibration
from popcompile.pruning.rows import Rows, decoder_inputs
from popcompile.pruning.sampling import sample, sample_behind
from popcompile.text.pictures import draw_picture

TOKENS = 40
#: of two prompts, width and height of each picture, and the part before which text stands
PROMPTS: list[tuple[list[tuple[int, int]], int]] = [([(64, 32), (20, 60)], 0), ([(48, 48)], 1)]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> VisionSubject:
    return VisionSubject.saved(tmp_path_factory.mktemp("models") / "vision")


def pictures_of(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [draw_picture("some text", ("one", "two"), size, random.Random(i)) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def rows(subject: VisionSubject) -> Rows:
    """Two prompts with pictures of three sizes, and room for 8 tokens behind them."""
    written = [subject.written(pictures_of(sizes), TOKENS, at) for sizes, at in PROMPTS]
    return subject.prompts.rows(written, TOKENS + 8)


def test_a_prompt_is_the_processors_with_a_part_of_the_text(subject: VisionSubject) -> None:
    processor: Any = subject.images.processor
    plain = list(range(40, 80))
    text = [*plain[:20], *MARKS.values(), *plain[20:]]
    for sizes, at in PROMPTS:
        pictures = pictures_of(sizes)
        prompt = subject.prompts.write([*pictures, "w8 w9"], TOKENS, text, at)
        assert prompt is not None and len(prompt.ids) == TOKENS
        content: list[Any] = [{"type": "image", "image": picture} for picture in pictures]
        content += [{"type": "text", "text": "w8 w9"}]
        filled = TOKENS - len(encoded(processor, content)["input_ids"][0])
        words = " ".join(f"w{i}" for i in plain[-filled:]) + " "
        content.insert(at, {"type": "text", "text": words})
        theirs = encoded(processor, content)
        assert torch.equal(prompt.ids, theirs["input_ids"][0])
        seen = subject.model.model.get_image_features(theirs["pixel_values"], theirs["image_grid_thw"])
        parts = [seen.pooler_output, *seen.deepstack_features]
        features = torch.cat([torch.cat(list(part)) for part in parts], 1)
        torch.testing.assert_close(prompt.features, features, rtol=0, atol=1e-4)


def encoded(processor: Any, content: list[Any]) -> Any:
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


def test_text_that_is_too_short_is_taken_again(subject: VisionSubject) -> None:
    (picture,) = pictures_of([(16, 16)])
    prompt = subject.prompts.write([picture, "w8"], 30, [40, 41, 42], 0)
    assert prompt is not None
    bare = subject.prompts.write([picture, "w8"], subject.prompts.shortest() + 1, [], 0)
    assert bare is not None and len(prompt.ids) == 30
    assert prompt.ids.tolist()[: 31 - len(bare.ids)] == [5, *([40, 41, 42] * 10)[-(30 - len(bare.ids)) :]]


def test_a_prompt_that_has_no_room_is_none(subject: VisionSubject) -> None:
    (picture,) = pictures_of([(64, 64)])
    assert subject.prompts.write([picture, "w8"], 12, [40], 0) is None
    assert subject.prompts.write([picture, "w8"], 40, list(MARKS.values()), 0) is None


@torch.no_grad()
def test_rows_of_unlike_images_are_what_transformers_computes(subject: VisionSubject, rows: Rows) -> None:
    """Several grids in one batch; tokens at any slots."""
    layers = subject.layers
    for slots in (rows.slots, torch.tensor([[3, 9, 20, 41], [0, 30, 44, 7]])):
        tokens = layers.tokens(rows, slots)
        for i, (sizes, _) in enumerate(PROMPTS):
            prompt = subject.reference_prompt(rows.ids[i], pictures_of(sizes))
            given = reference.given_of(subject.model, prompt)
            expected = given.embeddings[0, slots[i]]
            torch.testing.assert_close(layers.embed(tokens)[i], expected, rtol=0, atol=1e-4)
    causal = torch.ones(1, rows.length, rows.length, dtype=torch.bool).tril()
    tokens = layers.tokens(rows, rows.slots)
    x = layers.embed(tokens)
    for layer in range(layers.num_layers):
        x = layers.layer(layer, x, tokens, causal)
    logits = layers.logits(x, tokens)
    for i, (sizes, _) in enumerate(PROMPTS):
        expected = reference.full_logits(subject.model, subject.reference_prompt(rows.ids[i], pictures_of(sizes)))[0]
        assert (logits[i] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_follows_images_is_sampled_from_the_model(subject: VisionSubject, rows: Rows) -> None:
    """Each drawn token has a probability that a model without the images does not give it."""
    drawn = sample_behind(subject.program, subject.read, rows, [TOKENS] * 2, seed=1)
    again, other = (sample_behind(subject.program, subject.read, rows, [TOKENS] * 2, seed=s) for s in (1, 2))
    assert torch.equal(drawn.ids, again.ids) and not torch.equal(drawn.ids, other.ids)
    assert torch.equal(drawn.ids[:, :TOKENS], rows.ids[:, :TOKENS]) and drawn.images is rows.images
    likely = greedy(subject, rows)
    for i, (sizes, _) in enumerate(PROMPTS):
        ids = rows.ids[i, :TOKENS].clone()
        for token in likely[i, TOKENS:].tolist():
            logits = reference.full_logits(subject.model, subject.reference_prompt(ids, pictures_of(sizes)))[0, -1]
            assert logits[token] > logits.max() - 1e-3
            ids = torch.cat((ids, torch.tensor([token])))


def greedy(subject: VisionSubject, rows: Rows) -> Tensor:
    graph = materialise(subject.program.graphs["model"], subject.program, subject.read)
    inputs = decoder_inputs(subject.program, subject.read)
    return sample(graph, rows, [TOKENS] * 2, seed=0, inputs=inputs, temperatures=[1e-5] * 2).ids


@torch.no_grad()
def test_loss_of_prompts_with_images_is_brute_force(subject: VisionSubject, rows: Rows) -> None:
    """First tokens at prompts' ends, and what follows a pruned prefill, with a window that begins in an image. Probes,
    which end at text, are prompts of their own.
    """
    pruned, window = [2, 4], 14
    held = HeldOut(subject.layers, rows, 1, TOKENS, 0, window)
    loss = held.measure(pruned, Calibration())
    first, after = [], []
    for i, (sizes, _) in enumerate(PROMPTS):
        given = reference.given_of(subject.model, subject.reference_prompt(rows.ids[i], pictures_of(sizes)))
        assert bool(given.visual[0, TOKENS - window]) == (i == 0)
        whole = reference.full_logits(subject.model, subject.reference_prompt(rows.ids[i], pictures_of(sizes)))[0]
        ends = [TOKENS - 1, *probes(rows, window)[i].tolist()]
        assert not any(given.visual[0, end] for end in ends)
        kl = [divergence(whole[end], prefill(subject, given, pruned, end + 1, window)[0]) for end in ends]
        first.append(torch.stack(kl).mean())
        cache = prefill(subject, given, pruned, TOKENS, window)[1]
        rest = reference.forward(subject.model, given.part(TOKENS, rows.length - 1), cache)[0]
        after.append(torch.stack([divergence(p, q) for p, q in zip(whole[TOKENS:-1], rest, strict=True)]).mean())
    assert loss.first_token_kl == pytest.approx(float(torch.stack(first).mean()), rel=1e-3)
    assert loss.kl == pytest.approx(float(torch.stack(after).mean()), rel=1e-3)
    assert min(loss.first_token_kl, loss.kl) > 1e-3


def probes(rows: Rows, window: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    earliest = window - 1 + min(32, (TOKENS - window) // 2)
    return rows.draw_slots(earliest, TOKENS - 1, max(2, 128 // window), generator)


def prefill(subject: VisionSubject, given: reference.Given, pruned: list[int], tokens: int, window: int) -> Any:
    logits, cache = reference.pop_prefill(subject.model, given.part(0, tokens), pruned, window=window)
    return logits[0, -1], cache


def divergence(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def test_no_prediction_is_asked_for_at_images(rows: Rows) -> None:
    """Nor before one. As many slots of each row as all have."""
    drawn = rows.draw_slots(2, TOKENS, 100, torch.Generator().manual_seed(0))
    assert drawn.shape[0] == 2 and 10 < drawn.shape[1] < TOKENS - 4
    for ids, slots in zip(rows.ids, drawn, strict=True):
        assert len(set(slots.tolist())) == len(slots) and slots.min() >= 2 and slots.max() < TOKENS
        assert not (ids[slots] == IMAGE).any() and not (ids[slots + 1] == IMAGE).any()
    assert rows.draw_slots(2, TOKENS, 5, torch.Generator().manual_seed(0)).shape == (2, 5)
    text = Rows(rows.ids).draw_slots(2, TOKENS, 5, torch.Generator().manual_seed(3))
    expected = [torch.randperm(38, generator=g)[:5] + 2 for g in [torch.Generator().manual_seed(3)] for _ in range(2)]
    assert torch.equal(text, torch.stack(expected)), "of text alone, as ever"


@torch.no_grad()
def test_rows_of_text_and_of_images_are_joined(subject: VisionSubject, rows: Rows) -> None:
    text = Rows(torch.randint(3, 80, (3, rows.length), generator=torch.Generator().manual_seed(4)))
    for parts in ((text, rows), (rows, text), (rows, rows)):
        both = parts[0].joined(parts[1])
        assert len(both) == len(parts[0]) + len(parts[1])
        apart = [subject.layers.tokens(part, part.slots) for part in parts]
        together = subject.layers.tokens(both, both.slots)
        expected = torch.cat([subject.layers.embed(tokens) for tokens in apart])
        assert torch.equal(subject.layers.embed(together), expected)
        assert both.images is not None
        positions = [p.slots.expand(3, -1, -1) if p.images is None else p.images.position_ids for p in parts]
        assert torch.equal(both.images.position_ids, torch.cat(positions, 1))
    assert text.joined(text).images is None
