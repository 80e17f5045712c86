"""Generation on real packages, against transformers' own loop; and what it refuses."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from pairs import TOLERANCE, Pair, assert_same_cache
from reference import pop_prefill
from torch import Tensor
from transformers import DynamicCache, TextIteratorStreamer

from popcompile.errors import PopcompileError
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.session import Runtime

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far away, there lived",
    "def fibonacci(n):\n    ",
    "Hello",
    "Water boils at a temperature of 100 degrees, and freezes at",
    "The three most important things in life are",
    "In 1969, the first human being to walk on the moon was",
    "To make a good cup of tea, you first need to",
    "A list is a mutable sequence type in Python. A tuple is",
    "My favourite book is",
]


@pytest.fixture(params=["smollm2", pytest.param("gemma", marks=pytest.mark.real)])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def test_full_prefill_generates_what_transformers_does(pair: Pair) -> None:
    inputs = pair.encode(TEXTS)
    arguments: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = pair.reference.generate(**inputs, **arguments)
    assert torch.equal(pair.model.generate(**inputs, prefill="full", **arguments), expected)


@pytest.mark.parametrize("prefill", ["pop", "full"])
def test_batch_generates_what_each_prompt_does_alone(smollm2: Pair, prefill: str) -> None:
    """Prompts of 1 to 13 tokens, beside a window of 8."""
    arguments: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "prefill": prefill}
    together = smollm2.model.generate(**smollm2.encode(TEXTS[:4]), **arguments)
    for row, text in enumerate(TEXTS[:4]):
        alone = smollm2.model.generate(**smollm2.encode([text]), **arguments)
        assert torch.equal(together[row, -8:], alone[0, -8:]), text


@pytest.mark.real
def test_pop_generation_is_the_reference(gemma: Pair) -> None:
    """The prompt pruned, every generated token of the full model."""
    ids = gemma.encode([TEXTS[1] * 3])["input_ids"]
    produced = gemma.model.generate(ids, prefill="pop", max_new_tokens=16, do_sample=False)
    logits, cache = pop_prefill(gemma.reference, ids, gemma.pruned, window=gemma.window)
    for token in produced[0, ids.shape[1] :]:
        assert int(logits[0, -1].argmax()) == token
        with torch.no_grad():
            logits = gemma.reference(token.view(1, 1), past_key_values=cache).logits


def test_second_turn_is_pruned_too(smollm2: Pair) -> None:
    """Only the new tokens are encoded, and what they leave is that of two pruned prompts one after the other."""
    model, first = smollm2.model, smollm2.tokens(40)
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "prefill": "pop"}
    arguments |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    one = model.generate(first, **arguments)
    branch = copy.deepcopy(one.past_key_values)
    whole = torch.cat((one.sequences, smollm2.tokens(12, seed=1)), dim=1)
    two = model.generate(whole, past_key_values=one.past_key_values, **arguments)

    _, expected = pop_prefill(smollm2.reference, first, smollm2.pruned, window=smollm2.window)
    with torch.no_grad():
        for token in one.sequences[0, 40:-1]:
            smollm2.reference(token.view(1, 1), past_key_values=expected)
    logits, expected = pop_prefill(smollm2.reference, whole[:, 45:], smollm2.pruned, expected, window=smollm2.window)
    assert (two.logits[0] - logits[:, 0]).abs().max() < TOLERANCE
    with torch.no_grad():
        for token in two.sequences[0, whole.shape[1] : -1]:
            smollm2.reference(token.view(1, 1), past_key_values=expected)
    assert_same_cache(two.past_key_values, expected)
    # the branch was left as it was; new tokens alone, under the mask of the whole, are the same turn
    again = model.generate(whole[:, 45:], attention_mask=torch.ones_like(whole), past_key_values=branch, **arguments)
    assert torch.equal(again.sequences[:, -6:], two.sequences[:, -6:])


@pytest.mark.parametrize("prefill", ["pop", "full"])
def test_second_turn_of_a_batch(smollm2: Pair, prefill: str) -> None:
    """Rows with unequal pasts and unequal new prompts, pads on the left of both turns."""
    model = smollm2.model
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "prefill": prefill, "eos_token_id": None}
    arguments["return_dict_in_generate"] = True
    inputs = smollm2.encode(TEXTS[:4])
    one = model.generate(**inputs, **arguments)
    turn = smollm2.encode([" And then?", " Tell me more about that, please.", " No", " Why is that so?"])
    ids = torch.cat((one.sequences, turn["input_ids"]), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(4, 8, dtype=torch.int64), turn["attention_mask"]), dim=1)
    two = model.generate(ids, attention_mask=mask, past_key_values=one.past_key_values, **arguments)
    for row in range(4):
        alone = model.generate(inputs["input_ids"][row, inputs["attention_mask"][row] == 1][None], **arguments)
        whole = ids[row, mask[row] == 1][None]
        alone = model.generate(whole, past_key_values=alone.past_key_values, **arguments)
        assert torch.equal(two.sequences[row, -8:], alone.sequences[0, -8:])
        assert two.past_key_values.kv.lengths[row] == alone.past_key_values.kv.lengths[0]


def test_pads_behind_a_finished_row_are_forgotten(smollm2: Pair) -> None:
    """Generation fills a finished row with pads; the next turn's mask hides them."""
    ids, mask = smollm2.tokens(20).view(2, 10), torch.ones(2, 10, dtype=torch.int64)
    cache = smollm2.model(ids, mask).past_key_values
    mask[0, 7:] = 0
    turn = smollm2.tokens(6, seed=1).view(2, 3)
    output = smollm2.model(turn, torch.cat((mask, torch.ones_like(turn)), dim=1), past_key_values=cache)
    expected = smollm2.model(torch.cat((ids[:1, :7], turn[:1]), dim=1))
    assert (output.logits[0] - expected.logits[0, -3:]).abs().max() < TOLERANCE
    assert output.past_key_values.kv.lengths == [10, 13]


def test_returned_logits_are_not_overwritten(smollm2: Pair) -> None:
    """Decode reuses its bindings; tensors handed out before stay as they were."""
    ids = smollm2.tokens(8)
    full = smollm2.model(ids).logits[0]
    cache, steps = None, []
    for column in range(8):
        output = smollm2.model(ids[:, column : column + 1], past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.logits[0])
    assert (torch.cat(steps) - full).abs().max() < TOLERANCE


def test_sampling_follows_the_seed(smollm2: Pair) -> None:
    inputs = smollm2.encode(TEXTS[:2])

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return smollm2.model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=1.0, top_k=50)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    several = smollm2.model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert len(several) == 4


def test_streaming(smollm2: Pair) -> None:
    inputs = smollm2.encode(TEXTS[:1])
    streamer = TextIteratorStreamer(smollm2.tokenizer, skip_prompt=True, timeout=60)
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 12, "do_sample": False}
    thread = Thread(target=smollm2.model.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = smollm2.model.generate(**arguments)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == smollm2.tokenizer.decode(whole)
    assert len(pieces) > 5


def test_prefill_as_asked(smollm2: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" is the pruned graph at every length: it encodes prompts no longer than its window in full."""
    stages: list[str] = []
    run = Runtime._run
    monkeypatch.setattr(Runtime, "_run", lambda self, stage, binding: (stages.append(stage), run(self, stage, binding)))
    arguments: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    for prefill, stage in (("auto", "prefill"), ("pop", "prefill"), ("full", "decode")):
        stages.clear()
        smollm2.model.generate(smollm2.tokens(9), prefill=prefill, **arguments)
        assert stages == [stage, "prefill"]  # a single token takes the graph that is loaded first


# --- errors ----------------------------------------------------------------------------------------------------


def generate(model: PopForCausalLM, ids: Any, **arguments: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": 2, "do_sample": False, **arguments})


def left_without_tokens() -> dict[str, Any]:
    return {"ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty"),
    "empty row": (left_without_tokens(), "row 1 of input_ids is empty"),
    "too long": ({"ids": torch.ones(1, 8000, dtype=torch.int64), "max_new_tokens": 193}, "context of 8192"),
    "far too long": ({"ids": torch.ones(1, 8193, dtype=torch.int64), "max_new_tokens": None}, "context of 8192"),
    "max_length": ({"ids": torch.ones(1, 9, dtype=torch.int64), "max_new_tokens": None, "max_length": 9}, "max_length"),
    "large id": ({"ids": torch.tensor([[1, 49152]])}, "token id 49152 is not in the vocabulary of 49152"),
    "negative id": ({"ids": torch.tensor([[1, -1]])}, "token id -1 is not in the vocabulary"),
    "floats": ({"ids": torch.ones(1, 3)}, "must be int64 token ids, not float32"),
    "a list": ({"ids": [[1, 2]]}, 'return_tensors="pt"'),
    "one dimension": ({"ids": torch.tensor([1, 2])}, "must have the shape"),
    "mask's shape": (
        {"ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1, 0]])},
        "attention_mask has",
    ),
    "prefill": ({"ids": torch.tensor([[1, 2]]), "prefill": "fast"}, "prefill fast: unknown"),
    "beam search": ({"ids": torch.tensor([[1, 2]]), "num_beams": 2}, "beam search is not supported"),
    "assisted": (
        {"ids": torch.tensor([[1, 2]]), "prompt_lookup_num_tokens": 2},
        "assisted generation is not supported",
    ),
    "static cache": ({"ids": torch.tensor([[1, 2]]), "cache_implementation": "static"}, "cache_implementation"),
    "other cache": ({"ids": torch.tensor([[1, 2]]), "past_key_values": DynamicCache()}, "past_key_values is a Dynamic"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_generate_says_what_is_wrong(smollm2: Pair, case: str) -> None:
    arguments, message = ERRORS[case]
    with pytest.raises(PopcompileError, match=message.replace("(", r"\(")) as caught:
        generate(smollm2.model, **arguments)
    assert "\n" not in str(caught.value)


def test_forward_says_what_is_wrong(smollm2: Pair) -> None:
    model = smollm2.model
    cache = model(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])).past_key_values
    more = torch.tensor([[4]])
    with pytest.raises(PopcompileError, match="context of 8192"):
        model(torch.ones(1, 8193, dtype=torch.int64))
    with pytest.raises(PopcompileError, match="was padding when it was fed"):
        model(more, torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(PopcompileError, match="hides cached tokens before others"):
        model(more, torch.tensor([[0, 0, 1, 1]]), past_key_values=cache)
    with pytest.raises(PopcompileError, match="3 columns and input_ids has 1"):
        generate(model, more, past_key_values=cache)
    with pytest.raises(PopcompileError, match="1 rows and the input 2"):
        model(torch.tensor([[4], [5]]), past_key_values=cache)
    with pytest.raises(PopcompileError, match="cannot be reordered, cropped"):
        cache.crop(1)
    with pytest.raises(PopcompileError, match="inputs_embeds"):
        model(more, inputs_embeds=torch.ones(1, 1, 576))
    assert model(more, torch.tensor([[0, 1, 1, 1]]), past_key_values=cache).logits.shape[1] == 1  # nothing was damaged


def test_padding_does_not_count_against_the_context(smollm2: Pair) -> None:
    ids, mask = torch.ones(1, 8192, dtype=torch.int64), torch.zeros(1, 8192, dtype=torch.int64)
    mask[0, -5:] = 1
    assert generate(smollm2.model, ids, attention_mask=mask).shape == (1, 8194)
