"""Every argument of transformers' `generate` and every field of GenerationConfig: it works as for transformers' own
model of the same weights, or is refused by its name with a reason. A new one upstream fails here until it is decided.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bad_input import refusal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from popcompile.runtime.generation import load
from popcompile.runtime.generation_arguments import ARGUMENTS, FIELDS

#: two prompts, the second padded on the left
IDS = torch.tensor([[5, 9, 12, 11, 7, 3], [0, 0, 4, 8, 6, 10]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
SAMPLE: dict[str, Any] = {"do_sample": True}
#: the tokens that the model puts after them, where nothing else is asked for
FIRST = [106, 91]


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


def own_loop(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """A decoding loop as custom_generate takes it: the second best token of each step."""
    for names in ("logits_processor", "stopping_criteria"):
        kwargs.pop(names)
    step = None
    for _ in range(3):
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **kwargs)
        output = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(output, kwargs)
        input_ids = torch.cat((input_ids, output.logits[:, -1].topk(2).indices[:, 1:]), dim=1)
        step = 1
    return input_ids


def alone(**arguments: Any) -> dict[str, Any]:
    """Of the first prompt, for what takes one."""
    return {"inputs": IDS[:1], "attention_mask": MASK[:1], **arguments}


Case = dict[str, Any] | Callable[[PreTrainedTokenizerBase], dict[str, Any]]

#: what works and changes what is generated; functions of the tokenizer where the argument holds state
WORKS: dict[str, Case] = {
    # arguments
    "inputs": alone(),
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=2, eos_token_id=None)},
    "logits_processor": lambda _: {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor(FIRST)])},
    "stopping_criteria": lambda _: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(8)])},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 7]},
    "streamer": lambda _: alone(streamer=Collect(), max_new_tokens=3),
    "negative_prompt_ids": {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[6, 3], [4, 4]])},
    "negative_prompt_attention_mask": {
        "guidance_scale": 3.0,
        "negative_prompt_ids": torch.tensor([[6, 3], [4, 4]]),
        "negative_prompt_attention_mask": torch.tensor([[0, 1], [1, 1]]),
    },
    "custom_generate": {"custom_generate": own_loop},
    # length
    "max_length": {"max_length": 9, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 9, "eos_token_id": list(range(128)), "pad_token_id": 0},
    "min_new_tokens": {"min_new_tokens": 3, "eos_token_id": list(range(128)), "pad_token_id": 0},
    "max_time": {"max_time": 0.0},
    "stop_strings": lambda tokenizer: {
        "stop_strings": [tokenizer.decode(37), tokenizer.decode(96)],
        "tokenizer": tokenizer,
    },
    # sampling
    "do_sample": SAMPLE,
    "temperature": SAMPLE | {"temperature": 0.01},
    "top_k": SAMPLE | {"top_k": 2},
    "top_p": SAMPLE | {"top_p": 0.1},
    "min_p": SAMPLE | {"min_p": 0.95},
    "top_h": SAMPLE | {"top_h": 0.3},
    "typical_p": SAMPLE | {"typical_p": 0.1},
    "epsilon_cutoff": SAMPLE | {"epsilon_cutoff": 0.0082},
    "eta_cutoff": SAMPLE | {"eta_cutoff": 0.5},
    "num_return_sequences": SAMPLE | {"num_return_sequences": 2},
    "renormalize_logits": SAMPLE | {"renormalize_logits": True, "temperature": 0.01},
    # logits
    "repetition_penalty": {"repetition_penalty": 100.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 100.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1, "sequence_bias": {(5,): 10.0}},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": {(5,): 10.0}},
    "bad_words_ids": {"bad_words_ids": [[token] for token in FIRST]},
    "forced_bos_token_id": {"inputs": torch.tensor([[5], [4]]), "attention_mask": None, "forced_bos_token_id": 11},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (1, 100.0),
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sequence_bias": {(2,): 0.1},
    },
    "suppress_tokens": {"suppress_tokens": FIRST},
    "begin_suppress_tokens": {"begin_suppress_tokens": FIRST},
    "sequence_bias": {"sequence_bias": {(5,): 10.0}},
    "token_healing": lambda tokenizer: alone(
        inputs=tokenizer("xya", return_tensors="pt")["input_ids"],
        attention_mask=None,
        token_healing=True,
        tokenizer=tokenizer,
    ),
    "guidance_scale": {"guidance_scale": 3.0},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    # outputs and special tokens
    "output_scores": {"output_scores": True, "return_dict_in_generate": True, "suppress_tokens": FIRST},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True, "suppress_tokens": FIRST},
    "return_dict_in_generate": {"return_dict_in_generate": True, "suppress_tokens": FIRST},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": list(range(64))},
    "bos_token_id": {"inputs": None, "attention_mask": None, "bos_token_id": 5},
    "eos_token_id": {"eos_token_id": list(range(128)), "pad_token_id": 0},
}

#: what works and changes nothing, here as there: of encoder-decoder models, or of what is refused
NO_EFFECT: dict[str, Any] = {
    "use_cache": False,
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.0,
    "low_memory": True,
    "remove_invalid_values": True,
    "decoder_start_token_id": 1,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "max_matching_ngram_size": 3,
    "compile_config": CompileConfig(),
    "disable_compile": True,
}

#: what is refused: a value that asks for something
REFUSED: dict[str, Any] = {
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "synced_gpus": True,
    "position_ids": torch.zeros(2, 6, dtype=torch.int64),
    "inputs_embeds": torch.zeros(2, 6, 32),
    "return_dict": False,
    "num_beams": 2,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "use_mtp": True,
    "speculation_type": "dflash",
    "is_assistant": True,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 64,
    "prefill_chunk_size": 4,
    "continuous_batching_config": object(),
    "output_attentions": True,
    "output_hidden_states": True,
}


def byte_level_tokenizer() -> PreTrainedTokenizerBase:
    """Of 128 tokens: printable bytes, the space, and two that begin as another does."""
    words = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "ab", "abc"]
    words += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(words))[: 128 - len(words)]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class Models:
    """The tiny package, transformers' own model of the same weights, and their tokenizer."""

    def __init__(self, package: Path, checkpoint: Path) -> None:
        self.package = package
        self.ours = load(package, prefill="full")
        self.theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
        self.tokenizer = byte_level_tokenizer()

    def run(self, case: Case) -> list[tuple[Any, list[Any]]]:
        """Of transformers and of popcompile: what generate returns, and what a streamer was given."""
        found = []
        for model in (self.theirs, self.ours):
            arguments: dict[str, Any] = {
                "inputs": IDS, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None,
            }  # fmt: skip
            arguments |= case(self.tokenizer) if callable(case) else case
            if "generation_config" in arguments:
                arguments = {
                    k: v for k, v in arguments.items() if k in ("inputs", "attention_mask", "generation_config")
                }
            torch.manual_seed(0)
            found.append((model.generate(**arguments), getattr(arguments.get("streamer"), "given", [])))
        return found


@pytest.fixture(scope="module")
def both(tiny_package: Path, tiny_checkpoint: Path) -> Models:
    return Models(tiny_package, tiny_checkpoint)


def test_every_argument_is_decided() -> None:
    version = f"transformers {transformers.__version__}"
    decided = {*WORKS, *NO_EFFECT, *REFUSED}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    new = (fields | arguments) - decided
    assert not new, f"new in {version}: decide whether each works or is refused (generation_arguments.py), list it here"
    assert set(REFUSED) == {*FIELDS, *ARGUMENTS}
    assert not set(WORKS) & set(NO_EFFECT) | set(WORKS) & (set(REFUSED) - {"custom_generate"})


@pytest.mark.parametrize("name", WORKS)
def test_works_as_in_transformers(name: str, both: Models) -> None:
    _require_field(name)
    (theirs, streamed), (ours, ours_streamed) = both.run(WORKS[name])
    base = both.run({})[0][0]
    if not isinstance(theirs, Tensor):
        for kind in ("scores", "logits"):
            assert (theirs[kind] is None) is (ours[kind] is None) if kind in theirs else getattr(ours, kind) is None
            for one, other in zip(getattr(theirs, kind) or (), getattr(ours, kind) or (), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        theirs, ours = theirs.sequences, ours.sequences
    assert torch.equal(ours, theirs) and ours_streamed == streamed
    assert not torch.equal(theirs, base), "the argument changes nothing here, so this shows nothing"


@pytest.mark.parametrize("name", NO_EFFECT)
def test_changes_nothing_as_in_transformers(name: str, both: Models) -> None:
    _require_field(name)
    (theirs, _), (ours, _) = both.run({name: NO_EFFECT[name]})
    assert torch.equal(ours, theirs) and torch.equal(theirs, both.run({})[0][0])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, both: Models) -> None:
    few = {"max_new_tokens": 2, "do_sample": False}
    line = refusal(lambda: both.ours.generate(IDS, attention_mask=MASK, **few, **{name: REFUSED[name]}))
    assert line.startswith(f"{name}: ") and len(line) > len(name) + 20
    if name in vars(GenerationConfig()) and name not in ("constraints", "continuous_batching_config"):
        config = GenerationConfig(**few)
        setattr(config, name, REFUSED[name])
        assert refusal(lambda: both.ours.generate(IDS, config, attention_mask=MASK)) == line


def test_no_code_of_a_repository_runs(both: Models, tmp_path: Path) -> None:
    """custom_generate as a path or a hub id, with trust_remote_code too."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(**_): raise SystemExit('ran')")
    for call in (
        lambda: both.ours.generate(IDS, custom_generate=str(tmp_path), trust_remote_code=True),
        lambda: both.ours.generate(IDS, None, None, None, None, None, None, None, None, None, str(tmp_path)),
        lambda: both.ours.load_custom_generate(str(tmp_path), trust_remote_code=True),
    ):
        assert refusal(call).startswith("custom_generate: ")
    assert "continuous batching" in refusal(lambda: both.ours.generate_batch([[5, 6]]))
    assert "cache_implementation" in refusal(lambda: both.ours.generate(IDS, cache_implementation="paged"))


@pytest.mark.parametrize("name", ["tokn", "max_tokens", "labels"])
def test_an_unknown_argument_is_named(name: str, both: Models) -> None:
    assert refusal(lambda: both.ours.generate(IDS, **{name: 1})).startswith(f"{name}: ")


def test_pipeline_says_nothing(both: Models, caplog: pytest.LogCaptureFixture) -> None:
    """pipeline() takes the model as one of transformers' own; its log lists no classes."""
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            answers = [
                pipeline("text-generation", model=model, tokenizer=both.tokenizer)(
                    ["the cat", "sat"], max_new_tokens=5, do_sample=False, stop_sequence="x"
                )
                for model in (both.theirs, both.ours)
            ]
    finally:
        transformers.logging.disable_propagation()
    assert answers[0] == answers[1]
    assert not [r for r in caplog.records if "supported" in r.getMessage() or r.levelno >= logging.ERROR]


def _require_field(name: str) -> None:
    """A table that is made for the newest transformers has fields that an older one lacks."""
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    if name not in known:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
