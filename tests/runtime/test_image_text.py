"""A vision-language package as a transformers model, against transformers' own, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_reference as reference
from bad_input import refusal
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedModel
from vision_checkpoint import draw_picture
from vision_reference import IMAGE, Prompt, Visual, given_of, make_prompt

import popcompile
from popcompile.runtime.image_text import PopForImageTextToText
from popcompile.runtime.verify import verify

PRUNED, WINDOW = [3, 4], 2  # of the package
SMALL, WIDE, TALL = Visual(4, 4), Visual(4, 6), Visual(8, 4)
FILM = Visual(4, 6, frames=2, video=True)
PROMPTS: dict[str, list[reference.Part]] = {
    "no image": [9],
    "an image": [3, WIDE, 5],
    "two equal": [3, SMALL, 2, SMALL, 4],
    "two of different size": [2, WIDE, 3, TALL, 4],
    "image first": [WIDE, 5],
    "image last": [4, WIDE],
    "adjacent": [2, SMALL, WIDE, 3],
    "video of two frames": [2, FILM, 4],
    "image and video": [2, SMALL, 3, FILM, 2, WIDE, 4],
}
TOLERANCE = 1e-4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}

#: of which the second is the first once more
BEST_OF_TWO = GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 2}


@pytest.fixture(scope="module")
def theirs(vision_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(vision_checkpoint, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ours(vision_package: Path) -> Iterator[PopForImageTextToText]:
    with popcompile.load(vision_package) as model:
        assert isinstance(model, PopForImageTextToText)
        yield model


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Prompt, new: int = 6) -> list[int]:
    """The whole model's next tokens. Not transformers' `generate`, which takes a new token for an image's where the
    prompt ends in one.
    """
    tokens, cache, slot = given_of(model, prompt), DynamicCache(), prompt.ids.shape[1]
    found = [int(reference.forward(model, tokens, cache)[0, -1].argmax())]
    for i in range(new - 1):
        logits = reference.forward(model, reference.next_token(model, found[-1], slot + i, tokens), cache)
        found.append(int(logits[0, -1].argmax()))
    return found


def batched(prompts: list[Prompt]) -> dict[str, Tensor]:
    """Rows padded on the left, and all pixels, one row after the other."""
    longest = max(p.ids.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p.ids, (longest - p.ids.shape[1], 0)) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - p.ids.shape[1]).long() for p in prompts])
    names = dict.fromkeys(name for p in prompts for name in p.pixels)
    pixels = {name: torch.cat([p.pixels[name] for p in prompts if name in p.pixels]) for name in names}
    return {"input_ids": ids, "attention_mask": mask, **pixels}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(prompt: str, ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    """Of the whole model, and of the pruned prefill."""
    given = make_prompt(PROMPTS[prompt])
    expected = reference.full_logits(theirs, given)
    assert close(ours(given.ids, mm_token_type_ids=given.kinds, **given.pixels).logits, expected)
    pruned, _ = reference.pop_prefill(theirs, given_of(theirs, given), PRUNED, window=WINDOW)
    assert not close(pruned, expected[:, -1:])
    assert close(ours(given.ids, prefill="pop", **given.pixels).logits, pruned)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generated_tokens(prompt: str, ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    given = make_prompt(PROMPTS[prompt], seed=1)
    found = ours.generate(given.ids, prefill="full", **given.pixels, **GREEDY).sequences
    assert found[0, given.ids.shape[1] :].tolist() == greedy(theirs, given)


@torch.no_grad()
def test_decoding_after_a_pruned_prompt(ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    """Positions fall behind slots by what an image saves, which the first new tokens have to know."""
    given = make_prompt(PROMPTS["two of different size"])
    tokens = given_of(theirs, given)
    assert tokens.delta < 0
    _, cache = reference.pop_prefill(theirs, tokens, PRUNED, window=WINDOW)
    held = ours(given.ids, prefill="pop", **given.pixels).past_key_values
    slot = given.ids.shape[1]
    for token in (11, IMAGE, 12):  # what looks like an image and was generated is text
        expected = reference.forward(theirs, reference.next_token(theirs, token, slot, tokens), cache)
        assert close(ours(torch.tensor([[token]]), past_key_values=held).logits, expected)
        slot += 1


def test_second_turns(ours: PopForImageTextToText, theirs: PreTrainedModel) -> None:
    """Of text, and with another image; pixels are those of the whole conversation, or new ones alone."""
    first, text, image = ([3, WIDE, 5], [3, WIDE, 5, 6], [3, WIDE, 5, 2, TALL, 3])
    whole = {name: make_prompt(parts) for name, parts in (("text", text), ("image", image))}
    begun = make_prompt(first)
    held = ours(begun.ids, **begun.pixels).past_key_values
    known = begun.ids.shape[1]
    for name, given in whole.items():
        new, expected = given.ids[:, known:], reference.full_logits(theirs, given)[:, known:]
        assert torch.equal(given.ids[:, :known], begun.ids)
        assert close(ours(new, past_key_values=copy.deepcopy(held), **given.pixels).logits, expected)
        tokens = ours.generate(given.ids, past_key_values=copy.deepcopy(held), prefill="full", **given.pixels, **GREEDY)
        assert tokens.sequences[0, given.ids.shape[1] :].tolist() == greedy(theirs, given), name
    later = {name: value[-32:] if name == "pixel_values" else value[-1:] for name, value in given.pixels.items()}
    assert close(ours(new, past_key_values=held, **later).logits, expected)


@pytest.mark.parametrize("prefill", ["full", "pop"])
def test_rows_do_not_depend_on_each_other(prefill: str, ours: PopForImageTextToText) -> None:
    """Different images and lengths, one row without any."""
    prompts = [make_prompt(PROMPTS[name], seed=i) for i, name in enumerate(PROMPTS)]
    together = ours.generate(**batched(prompts), prefill=prefill, **GREEDY).sequences[:, -6:]
    for row, prompt in zip(together, prompts, strict=True):
        alone = ours.generate(prompt.ids, prefill=prefill, **prompt.pixels, **GREEDY).sequences[0, -6:]
        assert torch.equal(row, alone)


def test_a_batch_goes_on(ours: PopForImageTextToText) -> None:
    """A second turn with new images for some rows."""
    prompts = [make_prompt(parts) for parts in ([3, WIDE, 5], [7], [2, SMALL, 2])]
    longer = [make_prompt(parts) for parts in ([3, WIDE, 5, 4], [7, TALL, 2], [2, SMALL, 2, SMALL, 1])]
    held = ours(**batched(prompts)).past_key_values
    given = batched([Prompt(b.ids[:, a.ids.shape[1] :], b.pixels) for a, b in zip(prompts, longer, strict=True)])
    given["attention_mask"] = torch.cat((held.seen.long(), given["attention_mask"]), 1)
    found = ours(**given, past_key_values=held).logits
    for row, prompt in enumerate(longer):
        assert close(found[row, -1:], ours(prompt.ids, **prompt.pixels).logits[0, -1:])


def test_sampled_answers(ours: PopForImageTextToText, theirs: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to each of two prompts are those that transformers samples, and their images are encoded once."""
    prompts = [make_prompt(PROMPTS[name], seed=i) for i, name in enumerate(("two of different size", "an image"))]
    given, encode, encoded = batched(prompts), ours.runtime.encode_images, []

    def watched(pixels: Tensor, grids: Tensor | None) -> Tensor:
        encoded.append(len(pixels))
        return encode(pixels, grids)

    monkeypatch.setattr(ours.runtime, "encode_images", watched)
    sampling: dict[str, Any] = {
        "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "min_new_tokens": 8, "top_k": 20,
        "suppress_tokens": [IMAGE, reference.VIDEO],
    }  # fmt: skip
    torch.manual_seed(0)
    found = ours.generate(**given, prefill="full", **sampling)
    torch.manual_seed(0)
    kinds = (given["input_ids"] == IMAGE).int()
    assert torch.equal(found, theirs.generate(**given, mm_token_type_ids=kinds, **sampling))
    assert len({tuple(row) for row in found.tolist()}) == 6
    assert encoded == [len(given["pixel_values"])]


@pytest.mark.parametrize("prefill", ["full", "pop"])
def test_several_answers_to_each_prompt(prefill: str, ours: PopForImageTextToText) -> None:
    """Where only the best token is drawn, all are what a prompt has alone; a prompt without images is among them."""
    prompts = [make_prompt(PROMPTS[name], seed=i) for i, name in enumerate(PROMPTS)]
    rows = ours.generate(**batched(prompts), prefill=prefill, **BEST_OF_TWO).sequences[:, -6:]
    for answers, prompt in zip(rows.split(2), prompts, strict=True):
        alone = ours.generate(prompt.ids, prefill=prefill, **prompt.pixels, **GREEDY).sequences[:, -6:]
        assert torch.equal(answers, alone.expand(2, -1))


def test_several_answers_in_a_second_turn(ours: PopForImageTextToText) -> None:
    """With a new image; the cache has a row for each answer, and pixels are those of the conversation, or new ones."""
    first = make_prompt([3, WIDE, 5])
    words = {"suppress_tokens": [IMAGE, reference.VIDEO]}  # ids that without a cache would be an image's
    turn = ours.generate(first.ids, prefill="full", **first.pixels, **words, **BEST_OF_TWO)
    second = make_prompt([2, TALL, 3], seed=1)
    ids = torch.cat((turn.sequences[:1], second.ids), 1)
    pixels = {name: torch.cat((first.pixels[name], second.pixels[name])) for name in first.pixels}
    alone = ours.generate(ids, prefill="full", **pixels, **GREEDY).sequences
    for given in (pixels, second.pixels):
        held = copy.deepcopy(turn.past_key_values)
        answers = ours.generate(ids, past_key_values=held, prefill="full", **given, **BEST_OF_TWO).sequences
        assert torch.equal(answers, alone.expand(2, -1))


def test_rows_that_are_not_one_prompt(ours: PopForImageTextToText) -> None:
    given = image_prompt()
    for rows in (3, 2):
        ids = given["input_ids"].repeat(rows, 1)
        ids[-1, 0] += 1
        line = refusal(lambda ids=ids: ours(**given | {"input_ids": ids}, num_return_sequences=2))
        assert "num_return_sequences is 2, and rows of input_ids that follow one another are unlike" in line


def test_low_memory(vision_package: Path, ours: PopForImageTextToText) -> None:
    """The vision graph is closed when the images of a call are encoded, and opened again."""
    given = make_prompt(PROMPTS["two of different size"])
    with popcompile.load(vision_package, low_memory=True) as model:
        for _ in range(2):
            assert close(model(given.ids, **given.pixels).logits, ours(given.ids, **given.pixels).logits)
            assert "vision" not in model.runtime._sessions


def test_what_a_processor_makes(
    vision_package: Path, ours: PopForImageTextToText, theirs: PreTrainedModel, tmp_path: Path
) -> None:
    """Of pictures and text, by the package's own."""
    processor = popcompile.load_processor(str(vision_package))
    pictures = [Image.open(draw_picture(tmp_path / f"{w}.png", w, h)) for w, h in ((32, 32), (20, 30))]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "w9 w10"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 2]]
    prompt = Prompt(inputs["input_ids"], {name: inputs[name] for name in ("pixel_values", "image_grid_thw")})
    assert close(ours(**inputs).logits, reference.full_logits(theirs, prompt))
    found = ours.generate(**inputs, prefill="full", **GREEDY).sequences[0, inputs["input_ids"].shape[1] :]
    assert found.tolist() == greedy(theirs, prompt)


# --- what does not go together -----------------------------------------------------------------------------------


def image_prompt(**changes: Any) -> dict[str, Any]:
    given = make_prompt([3, SMALL, 2, WIDE, 2])
    return {"input_ids": given.ids, **given.pixels} | changes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pixel_values": None, "image_grid_thw": None}, "10 image tokens and there is no pixel_values"),
        ({"input_ids": torch.arange(5, 20)[None]}, "pixel_values without image tokens"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "input_ids has 10 image tokens, and the pixels are for 4"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}, "10 image tokens, and the pixels are for 12"),
        ({"pixel_values": torch.zeros(41, 384)}, "pixel_values has 41 patches and the grids 40"),
        ({"image_grid_thw": None}, "image_grid_thw must be a tensor"),
        ({"pixel_values": [[1]]}, "must be a tensor of pixels"),
        ({"image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]])}, "the tokens of an image do not stand together"),
        ({"num_beams": 2}, "beam search is not supported"),
        ({"pixel_mask": torch.ones(2, 2)}, "pixel_mask: not taken"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], line: str, ours: PopForImageTextToText) -> None:
    assert line in refusal(lambda: ours.generate(**image_prompt(**changes), do_sample=True, max_new_tokens=2))


def test_an_image_in_two_calls(ours: PopForImageTextToText) -> None:
    given = image_prompt()
    line = refusal(lambda: ours(given["input_ids"][:, :6], **first_image(given)))
    assert "has 2 image tokens, and the pixels are for 4; give each image once, with all the tokens" in line


def test_an_image_in_two_rows(ours: PopForImageTextToText) -> None:
    given = make_prompt([3, SMALL, 2])
    apart = given.ids.clone()
    apart[:, 5] = 7
    rows = torch.cat((apart, torch.full_like(apart, 7)))
    rows[1, 0] = IMAGE
    assert "in one call or row and the rest in another" in refusal(lambda: ours(rows, **given.pixels))


def first_image(given: dict[str, Any]) -> dict[str, Tensor]:
    """The pixels of the first of two."""
    return {"pixel_values": given["pixel_values"][:16], "image_grid_thw": given["image_grid_thw"][:1]}


def test_forgetting(ours: PopForImageTextToText) -> None:
    """Text behind the last image can be hidden from later calls, an image cannot."""
    given = make_prompt([3, WIDE, 5])
    held = ours(given.ids, **given.pixels).past_key_values
    again = torch.tensor([[7, 8]])
    mask = torch.ones(1, given.ids.shape[1] + 2, dtype=torch.long)
    mask[:, -4:-2] = 0
    shorter = Prompt(torch.cat((given.ids[:, :-2], again), 1), given.pixels)
    branch = copy.deepcopy(held)
    assert close(
        ours(again, attention_mask=mask, past_key_values=branch).logits,
        ours(shorter.ids, **given.pixels).logits[:, -2:],
    )
    mask[:, 6:-2] = 0
    assert "text after the last image" in refusal(lambda: ours(again, attention_mask=mask, past_key_values=held))


def test_a_text_package_takes_no_images(tiny_package: Path) -> None:
    with popcompile.load(tiny_package) as model:
        assert "the package's model takes no images" in refusal(
            lambda: model.generate(**image_prompt(), max_new_tokens=2)
        )


# --- precisions and layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"layout": "unified", "dtype": "fp16"}, 1e-2),
        ({"dtype": "int8"}, 0.1),
        pytest.param({"layout": "unified"}, TOLERANCE, marks=pytest.mark.slow),
        pytest.param({"dtype": "w8a8"}, 0.1, marks=pytest.mark.slow),
    ],
)
def test_precisions(
    options: dict[str, str], tolerance: float, vision_checkpoint: Path, theirs: PreTrainedModel, tmp_path: Path
) -> None:
    """Of the decoder's layers and the embedding; the vision tower's weights are not quantized."""
    out = tmp_path / "out"
    popcompile.convert(vision_checkpoint, out, layers="3-4", kv_projection="layer", window=WINDOW, **options)
    given = make_prompt(PROMPTS["two of different size"])
    expected, _ = reference.pop_prefill(theirs, given_of(theirs, given), PRUNED, window=WINDOW)
    with popcompile.load(out) as model:
        found = model(given.ids, prefill="pop", **given.pixels).logits.float()
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    assert {check["check"] for check in verify(out)} >= {"images", "numbers"}
