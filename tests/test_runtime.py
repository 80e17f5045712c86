"""The runtime on real packages, against transformers' own modules and generation loop."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from reference import full_cache, pop_prefill
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, TextIteratorStreamer
from transformers import logging as transformers_logging

import popcompile.runtime
from popcompile.errors import PopcompileError
from popcompile.generation import PopCache, PopForCausalLM, load
from popcompile.runtime import Runtime

#: fp32 kernels of two libraries over 18 to 30 layers; logits and cache entries are of the order of 10
TOLERANCE = 1e-3

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


class Pair:
    """A package and the checkpoint that it was made of."""

    def __init__(self, package: Path, checkpoint: Path) -> None:
        transformers_logging.disable_progress_bar()
        self.package = package
        self.model = load(package)
        self.reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    @property
    def pruned(self) -> list[int]:
        return self.model.manifest.pruned

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def tokens(self, length: int, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randint(5, 40_000, (1, length), generator=random)


@pytest.fixture(scope="module")
def smollm2(smollm2_package: Path, smollm2_checkpoint: Path) -> Pair:
    return Pair(smollm2_package, smollm2_checkpoint)


@pytest.fixture(scope="module")
def gemma(gemma_package: Path, gemma_checkpoint: Path) -> Pair:
    return Pair(gemma_package, gemma_checkpoint)


@pytest.fixture(params=["smollm2", "gemma"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def assert_same_cache(cache: PopCache, expected: DynamicCache, row: int = 0) -> None:
    length = cache.kv.lengths[row]
    for index, tensor in enumerate(cache.kv.tensors()):
        layer = expected.layers[index // 2]
        other = layer.keys if index % 2 == 0 else layer.values
        assert other is not None and other.shape[2] == length
        assert (tensor[row, :, :length] - other[0]).abs().max() < TOLERANCE, f"layer {index // 2}"


# --- one call --------------------------------------------------------------------------------------------------

LENGTHS = [("smollm2", n) for n in (1, 2, 17, 300)] + [("gemma", n) for n in (1, 2, 17, 300, 700)]


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_full_model_is_transformers(name: str, length: int, request: pytest.FixtureRequest) -> None:
    """Logits of every token and the cache; then nine more tokens, then one, after that past."""
    pair: Pair = request.getfixturevalue(name)
    expected, cache = full_cache(pair.reference), None
    for new in (length, 9, 1):
        ids = pair.tokens(new, seed=new)
        output = pair.model(ids, past_key_values=cache)
        cache = output.past_key_values
        with torch.no_grad():
            logits = pair.reference(ids, past_key_values=expected).logits
        assert output.logits.shape == logits.shape
        assert (output.logits - logits).abs().max() < TOLERANCE
        assert_same_cache(cache, expected)


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_pop_prefill_is_the_reference(name: str, length: int, request: pytest.FixtureRequest) -> None:
    """A prompt, then a second turn's prompt after it, both pruned; then a token of the full model."""
    pair: Pair = request.getfixturevalue(name)
    first, second, last = pair.tokens(length), pair.tokens(9, seed=1), pair.tokens(1, seed=2)
    output = pair.model(first, prefill="pop")
    logits, expected = pop_prefill(pair.reference, first, pair.pruned)
    assert output.logits.shape == logits.shape == (1, 1, pair.model.manifest.vocab_size)
    assert (output.logits - logits).abs().max() < TOLERANCE
    assert_same_cache(output.past_key_values, expected)
    for ids in (second, last):
        output = pair.model(ids, past_key_values=output.past_key_values, prefill="pop")
        logits, expected = pop_prefill(pair.reference, ids, pair.pruned, expected)
        assert (output.logits - logits).abs().max() < TOLERANCE
        assert_same_cache(output.past_key_values, expected)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_logits_stand_where_the_tokens_are(smollm2: Pair, side: str) -> None:
    lengths, width = (3, 11, 1), 11
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        columns = {
            "left": range(width - length, width),
            "right": range(length),
            "holes": sorted(torch.randperm(width, generator=torch.Generator().manual_seed(row))[:length].tolist()),
        }[side]
        mask[row, list(columns)] = 1
    ids = torch.randint(5, 40_000, mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(mask == 0, -100)
    output = smollm2.model(ids, mask)
    last = smollm2.model(ids, mask, logits_to_keep=1)
    for row, length in enumerate(lengths):
        alone = smollm2.model(ids[row, mask[row] == 1][None]).logits[0]
        assert (output.logits[row, mask[row] == 1] - alone).abs().max() < TOLERANCE
        assert not output.logits[row, mask[row] == 0].any()
        assert (last.logits[row] - alone[-1:]).abs().max() < TOLERANCE
        assert output.past_key_values.kv.lengths[row] == length


def test_long_full_prefill_in_pieces(smollm2: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the last logits are asked for, those of all tokens are never in memory at once."""
    ids, mask = smollm2.tokens(100).view(2, 50), torch.ones(2, 50, dtype=torch.int64)
    mask[0, :13] = 0
    whole = smollm2.model(ids, mask, logits_to_keep=1)
    monkeypatch.setattr(popcompile.runtime, "_LOGITS_BYTES", 20 * 49152 * 4)
    pieces = smollm2.model(ids, mask, logits_to_keep=1)
    assert (whole.logits - pieces.logits).abs().max() < TOLERANCE
    assert pieces.past_key_values.kv.lengths == [37, 50]
    for one, other in zip(whole.past_key_values.kv.tensors(), pieces.past_key_values.kv.tensors(), strict=True):
        assert (one[0, :, :37] - other[0, :, :37]).abs().max() < TOLERANCE
        assert (one[1] - other[1]).abs().max() < TOLERANCE


def test_use_cache(smollm2: Pair) -> None:
    ids = smollm2.tokens(5)
    assert smollm2.model(ids, use_cache=False).past_key_values is None
    assert isinstance(smollm2.model(ids, return_dict=False), tuple)
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    without = smollm2.model.generate(ids, use_cache=False, prefill="pop", **arguments)
    with_cache = smollm2.model.generate(ids, prefill="pop", **arguments)
    assert without.past_key_values is None
    assert torch.equal(without.sequences, with_cache.sequences)


# --- generation ------------------------------------------------------------------------------------------------


def test_full_prefill_generates_what_transformers_does(pair: Pair) -> None:
    inputs = pair.encode(TEXTS)
    arguments: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
    expected = pair.reference.generate(**inputs, **arguments)
    assert torch.equal(pair.model.generate(**inputs, prefill="full", **arguments), expected)


@pytest.mark.parametrize("prefill", ["pop", "full"])
def test_batch_generates_what_each_prompt_does_alone(smollm2: Pair, prefill: str) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "prefill": prefill}
    together = smollm2.model.generate(**smollm2.encode(TEXTS[:8]), **arguments)
    for row, text in enumerate(TEXTS[:8]):
        alone = smollm2.model.generate(**smollm2.encode([text]), **arguments)
        assert torch.equal(together[row, -32:], alone[0, -32:]), text


def test_pop_generation_is_the_reference(gemma: Pair) -> None:
    """The prompt pruned, every generated token of the full model."""
    ids = gemma.encode([TEXTS[1] * 3])["input_ids"]
    produced = gemma.model.generate(ids, prefill="pop", max_new_tokens=16, do_sample=False)
    logits, cache = pop_prefill(gemma.reference, ids, gemma.pruned)
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

    _, expected = pop_prefill(smollm2.reference, first, smollm2.pruned)
    with torch.no_grad():
        for token in one.sequences[0, 40:-1]:
            smollm2.reference(token.view(1, 1), past_key_values=expected)
    logits, expected = pop_prefill(smollm2.reference, whole[:, 45:], smollm2.pruned, expected)
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


def test_auto_prefill(smollm2: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "full" below the threshold, "pop" from there, counted in new tokens of the longest row."""
    model, threshold = smollm2.model, smollm2.model.manifest.prefill_threshold
    assert threshold > 2
    assert [model.choose_prefill(n) for n in (1, threshold - 1, threshold)] == ["full", "full", "pop"]
    assert [model.choose_prefill(n, "full") for n in (1, threshold)] == ["full", "full"]
    stages: list[str] = []
    run = Runtime._run
    monkeypatch.setattr(Runtime, "_run", lambda self, stage, binding: (stages.append(stage), run(self, stage, binding)))
    arguments: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    short = model.generate(smollm2.tokens(threshold - 1), **arguments)
    assert stages == ["decode", "decode"]
    stages.clear()
    model.generate(
        torch.cat((short.sequences, smollm2.tokens(4)), 1), past_key_values=short.past_key_values, **arguments
    )
    assert stages == ["decode", "decode"]  # few new tokens after a past that is longer than the threshold
    stages.clear()
    model.generate(smollm2.tokens(threshold), **arguments)
    assert stages == ["prefill", "decode"]
    stages.clear()
    model.generate(smollm2.tokens(threshold), prefill="full", **arguments)
    assert stages == ["decode", "decode"]


# --- memory ----------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous in smaps_rollup")


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS in status")


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")


@needs_proc
def test_second_session_adds_no_weights(smollm2: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    opened = Runtime._open

    def measured(self: Runtime, stage: str, packed: bool) -> Any:
        before = resident_bytes()
        session = opened(self, stage, packed)
        sizes.append(resident_bytes() - before)
        return session

    monkeypatch.setattr(Runtime, "_open", measured)
    Runtime(smollm2.package)
    weights = (smollm2.package / smollm2.model.manifest.weights).stat().st_size
    assert sizes[1] < 0.1 * weights


@needs_proc
def test_low_memory_holds_one_copy(smollm2: Pair) -> None:
    """Weights stay pages of the file: what the process allocates is for activations and 100 tokens' cache."""
    weights = (smollm2.package / smollm2.model.manifest.weights).stat().st_size
    before = anonymous_bytes()
    model = load(smollm2.package, low_memory=True)
    ids = smollm2.tokens(100)
    expected = smollm2.model.generate(ids, max_new_tokens=8, do_sample=False, prefill="pop")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, prefill="pop"), expected)
    assert anonymous_bytes() - before < 0.2 * weights


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
    "static cache": ({"ids": torch.tensor([[1, 2]]), "cache_implementation": "static"}, "cache_implementation is not"),
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


# --- loading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(smollm2: Pair, tmp_path: Path) -> Path:
    """A copy of the package whose files may be changed; the weights are linked."""
    folder = tmp_path / "package"
    shutil.copytree(smollm2.package, folder, ignore=shutil.ignore_patterns("*.data"))
    (folder / "weights.onnx.data").symlink_to(smollm2.package / "weights.onnx.data")
    return folder


def test_load_checks_the_package(changed: Path, tmp_path: Path) -> None:
    with pytest.raises(PopcompileError, match="no such package folder"):
        load(tmp_path / "nothing")
    (changed / "decode.onnx").write_bytes((changed / "prefill.onnx").read_bytes())
    with pytest.raises(PopcompileError, match=r"decode\.onnx is not the file"):
        load(changed)
    (changed / "decode.onnx").unlink()
    with pytest.raises(PopcompileError, match=r"decode\.onnx is missing"):
        load(changed)


def test_load_checks_config(changed: Path) -> None:
    config = json.loads((changed / "config.json").read_text())
    text = json.dumps(config | {"model_type": "no-such-type"})
    size = (changed / "config.json").stat().st_size
    (changed / "config.json").write_text(text)
    assert len(text) != size
    with pytest.raises(PopcompileError, match=r"config\.json"):
        load(changed)


def test_providers(smollm2: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PopcompileError, match="provider tpu: unknown; choose one of cpu, cuda"):
        load(smollm2.package, provider="tpu")
    with pytest.raises(PopcompileError, match="prefill fast: unknown"):
        load(smollm2.package, prefill="fast")
    monkeypatch.setattr(popcompile.runtime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(PopcompileError, match="has no CUDAExecutionProvider"):
        load(smollm2.package, provider="cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(popcompile.runtime._has_cuda_device(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu(smollm2: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing of ONNX Runtime's own on stdout or stderr."""
    if "CUDAExecutionProvider" not in popcompile.runtime.ort.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA")
    with pytest.raises(PopcompileError, match="no NVIDIA GPU"):
        load(smollm2.package, provider="cuda")
    monkeypatch.setattr(popcompile.runtime, "_has_cuda_device", lambda: True)  # as with a GPU, but no CUDA libraries
    with pytest.raises(PopcompileError, match="cannot use it"):
        load(smollm2.package, provider="cuda")
    assert capfd.readouterr() == ("", "")
