"""A package of Gemma-3 with images, which see all of themselves, as a transformers model, against transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import image_attention_reference as reference
import pytest
import torch
from image_attention_reference import Image, Prompt, embeddings_of, gemma3, make_prompt
from PIL import Image as Pillow
from torch import Tensor
from transformers import AutoProcessor, DynamicCache, PreTrainedModel
from vision_checkpoint import draw_picture
from vision_reference import random_model

import popcompile
from popcompile.runtime import session
from popcompile.runtime.image_text import PopForImageTextToText

PRUNED, WINDOW = [1, 3], 6  # of the package
PROMPTS: dict[str, list[reference.Part]] = {
    "no image": [9],
    "an image": [3, Image(), 5],
    "a short question": [3, Image(), 2],
    "two": [2, Image(), 9, Image(), 4],
    "first": [Image(marked=False), 5],
    "last": [4, Image()],
    "with nothing between": [2, Image(marked=False), Image(marked=False), 3],
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return random_model(gemma3())


@pytest.fixture(scope="module")
def package(gemma_vision_package: Path) -> Path:
    return gemma_vision_package


@pytest.fixture(scope="module")
def ours(package: Path) -> Iterator[PopForImageTextToText]:
    with popcompile.load(package) as model:
        assert isinstance(model, PopForImageTextToText)
        yield model


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def inputs_of(prompt: Prompt) -> dict[str, Any]:
    """What a processor gives."""
    pixels = {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
    return {"input_ids": prompt.ids, "token_type_ids": prompt.types, **pixels}


def batched(prompts: list[Prompt]) -> dict[str, Tensor]:
    """Rows padded on the left, and all pixels, one row after the other."""
    longest = max(p.ids.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p.ids, (longest - p.ids.shape[1], 0)) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - p.ids.shape[1]).long() for p in prompts])
    pixels = torch.cat([p.pixels for p in prompts if p.pixels is not None])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(name: str, ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    """Of the whole model, of which a causal mask gives others, and of the pruned prefill."""
    prompt = make_prompt(PROMPTS[name])
    expected = reference.full_logits(theirs, prompt)
    found = ours(**inputs_of(prompt)).logits
    assert difference(found, expected) < TOLERANCE
    if prompt.pixels is not None:
        assert difference(found, reference.full_logits(theirs, prompt, causal=True)) > 1e-2
    pruned, _ = reference.pop_prefill(theirs, embeddings_of(theirs, prompt), PRUNED, window=WINDOW)
    assert difference(ours(prefill="pop", **inputs_of(prompt)).logits, pruned) < TOLERANCE


@torch.no_grad()
def test_a_second_turn_with_an_image(ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    """After a turn with one, of a copy of the cache; all pixels are given again."""
    whole = make_prompt([3, Image(), 5, 2, Image(), 4])
    assert whole.pixels is not None
    known = 3 + reference.IMAGE_TOKENS + 2 + 5
    first = Prompt(whole.ids[:, :known], whole.pixels[:1])
    held = copy.deepcopy(ours(**inputs_of(first)).past_key_values)
    later = inputs_of(whole) | {"input_ids": whole.ids[:, known:], "past_key_values": held}
    assert difference(ours(**later).logits, reference.full_logits(theirs, whole)[:, known:]) < TOLERANCE


@torch.no_grad()
def test_generated_tokens(ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    """After the pruned prefill, of a batch of unlike rows."""
    prompts = [make_prompt(PROMPTS[name], seed=i) for i, name in enumerate(PROMPTS)]
    found = ours.generate(**batched(prompts), do_sample=False, max_new_tokens=4)[:, -4:]
    for row, prompt in zip(found, prompts, strict=True):
        logits, cache = reference.pop_prefill(theirs, embeddings_of(theirs, prompt), PRUNED, window=WINDOW)
        expected = []
        for _ in range(4):
            expected.append(int(logits[0, -1].argmax()))
            wide = torch.nn.functional.pad(theirs.get_input_embeddings()(torch.tensor([expected[-1:]])), (0, 1))
            logits = text_step(theirs, wide, cache)
        assert row.tolist() == expected


def test_several_answers_to_each_prompt(ours: PopForImageTextToText) -> None:
    """Each has its own images, of which some have two; only the best token is drawn."""
    prompts = [make_prompt(PROMPTS[name], seed=i) for i, name in enumerate(PROMPTS)]
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 1, "max_new_tokens": 4, "min_new_tokens": 4}
    rows = ours.generate(**batched(prompts), num_return_sequences=2, **drawn)[:, -4:]
    for answers, prompt in zip(rows.split(2), prompts, strict=True):
        alone = ours.generate(**inputs_of(prompt), **drawn)[:, -4:]
        assert torch.equal(answers, alone.expand(2, -1))


def text_step(model: PreTrainedModel, wide: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of a token of text after a cache, which may hold images: they are behind it, and seen by it as any."""
    return model(inputs_embeds=wide[:, :, :-1], past_key_values=cache, use_cache=True).logits


def test_a_full_prefill_in_pieces(package: Path, theirs: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits of all tokens would take too much memory; no piece ends inside an image."""
    prompt = make_prompt([7, Image(), 9, Image(marked=False), Image(marked=False), 5])
    monkeypatch.setattr(session, "_LOGITS_BYTES", 10 * 96 * 4)
    with popcompile.load(package) as model:
        found = model(prefill="full", logits_to_keep=1, **inputs_of(prompt)).logits
    assert difference(found, reference.full_logits(theirs, prompt)[:, -1:]) < TOLERANCE


def test_what_a_processor_makes(
    package: Path, ours: PopForImageTextToText, theirs: PreTrainedModel, tmp_path: Path
) -> None:
    """transformers' own, which needs no torchvision here."""
    processor = AutoProcessor.from_pretrained(package)
    assert type(popcompile.load_processor(package)) is type(processor)
    picture = Pillow.open(draw_picture(tmp_path / "a.png", 48, 40))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "w9 w10"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    prompt = Prompt(inputs["input_ids"], inputs["pixel_values"])
    assert int(prompt.types.sum()) == reference.IMAGE_TOKENS
    assert difference(ours(**inputs).logits, reference.full_logits(theirs, prompt)) < TOLERANCE
