"""What a config's JSON must hold before a library interprets it: types, bounds, and what the checkpoint's tensors say.

The expected types are the libraries' own, by their annotations: transformers' config classes, PEFT's. The values are
bounded because loops and tables are sized by them: 10^9 layers or labels would be built one by one.

    check_types("m: config.json", {"architectures": True}, {"architectures": list[str] | None})
    PopcompileError: m: config.json: architectures is true, not a list of strings or null; fix it
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import types
import typing
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import torch
from transformers import PretrainedConfig

from popcompile.errors import PopcompileError

INTEGERS = 2**31
"""Positions, token ids and sizes are int32 in some kernel; beyond it is no model's field."""

FLOATS = 3e38
"""The largest number in fp32; tokenizers call 10^30 "no maximum"."""

COUNTS = {
    re.compile(r"(layers?|^depth)$"): 2**12,
    re.compile(r"(blocks|modules|labels)$"): 2**14,
    re.compile(r"experts$"): 2**16,
}
"""Names of fields, wherever they stand in a config, by which libraries count in loops, and the most of them."""

SIZES = {
    "num_hidden_layers": 2**12, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "hidden_size": 2**24, "vocab_size": 2**28, "max_position_embeddings": INTEGERS - 1,
}  # fmt: skip
"""Fields of a decoder's config, by transformers' common names, that are at least 1 where given, and the most."""

_Tokens = int | list[int] | None
_Number = float | None
_Flag = bool | None

GENERATION: dict[str, Any] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), _Tokens),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _Tokens),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k"), int | None),
    **dict.fromkeys(("num_beams", "num_return_sequences", "no_repeat_ngram_size", "num_beam_groups"), int | None),
    **dict.fromkeys(("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"), _Number),
    **dict.fromkeys(("eta_cutoff", "repetition_penalty", "length_penalty", "max_time"), _Number),
    **dict.fromkeys(("guidance_scale", "diversity_penalty", "encoder_repetition_penalty"), _Number),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), _Flag),
    **dict.fromkeys(("output_scores", "output_logits", "return_dict_in_generate", "token_healing"), _Flag),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "disable_compile"), _Flag),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), list[int] | None),
    **dict.fromkeys(("transformers_version", "cache_implementation"), str | None),
    "stop_strings": str | list[str] | None,
    "bad_words_ids": list[list[int]] | None,
    "exponential_decay_length_penalty": list[float] | None,
    "early_stopping": bool | str | None,
    "cache_config": dict | None,
    "watermarking_config": dict | None,
    "sequence_bias": list | dict | None,
}
"""generation_config.json; transformers' GenerationConfig has no annotations."""

_Token = str | dict | None

TOKENIZER: dict[str, Any] = {
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token"), _Token),
    "mask_token": _Token,
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), _Flag),
    **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens", "use_default_system_prompt"), _Flag),
    **dict.fromkeys(("padding_side", "truncation_side"), Literal["left", "right"] | None),
    "model_max_length": _Number,
    "tokenizer_class": str | None,
    "processor_class": str | None,
    "chat_template": str | list[dict[str, str]] | dict[str, str] | None,
    "added_tokens_decoder": dict[str, dict] | None,
    "additional_special_tokens": list[str | dict] | None,
    "extra_special_tokens": list[str | dict] | dict[str, str | dict] | None,
    "model_input_names": list[str] | None,
    "fast_tokenizer_files": list[str] | None,
    "auto_map": list[str | None] | dict[str, Any] | None,
    "sp_model_kwargs": dict[str, Any] | None,
}
"""tokenizer_config.json; the classes that it names take more."""


def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's or TypedDict's fields, none where its annotations cannot be resolved."""
    try:
        hints = typing.get_type_hints(cls, localns={"torch": torch})
    except Exception:  # annotations that name what is not imported: the library itself has to check its fields
        return {}
    names = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(hints)
    return {name: hint for name, hint in hints.items() if name in names}


def check_types(subject: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise PopcompileError for a field of another type than its hint, or a number that no config holds.

    subject: what the message begins with, "MODEL: config.json".
    """
    for name, value in content.items():
        if name in hints and not _fits(value, hints[name]):
            raise PopcompileError(f"{subject}: {name} is {_shown(value)}, not {_words(hints[name])}; fix it")
    for name, value in _numbers(content):
        most = next((most for pattern, most in COUNTS.items() if pattern.search(name)), None)
        if most is not None and abs(value) > most:
            raise PopcompileError(f"{subject}: {name} is {_shown(value)}, more than {most:,}; fix it")


def check_fields(subject: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """`check_types`, and raise PopcompileError for a known field with an integer of more than 31 bits."""
    check_types(subject, content, hints)
    known = {name: value for name, value in content.items() if name in hints}
    for name, value in _numbers(known):
        if isinstance(value, int) and abs(value) >= INTEGERS:
            raise PopcompileError(f"{subject}: {name} is {_shown(value)}, which is out of range; fix it")


def check_end(subject: str, content: Mapping[str, Any]) -> None:
    """Raise PopcompileError for a list of no tokens that end a text: null says that there is none."""
    if content.get("eos_token_id") == []:
        raise PopcompileError(f"{subject}: eos_token_id is [], a list of no token; give one, or null")


def check_names(subject: str, content: Mapping[str, Any], cls: type) -> None:
    """Raise PopcompileError for a field that would replace a method of the class that takes it."""
    for name in content:
        if callable(getattr(cls, name, None)) or name in ("attribute_map", "sub_configs", "sub_configs_defaults"):
            raise PopcompileError(f"{subject}: {_shown(name)} is no field of a config; remove it")


def config_hints(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """The types of a transformers config's fields, under the common names too that its class maps to its own."""
    hints = hints_of(cls)
    return hints | {common: hints[own] for common, own in cls.attribute_map.items() if own in hints}


def check_sizes(subject: str, config: PretrainedConfig) -> None:
    """Raise PopcompileError for a size of a decoder that is no positive integer, or that no model has."""
    for name, most in SIZES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise PopcompileError(f"{subject}: {name} is {_shown(value)}; it has to be an integer from 1 to {most:,}")
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and heads % kv_heads:
        raise PopcompileError(
            f"{subject}: num_attention_heads is {heads}, which num_key_value_heads {kv_heads} does not divide; fix it"
        )
    if not isinstance(getattr(config, "dtype", None), torch.dtype | str | None):
        raise PopcompileError(f"{subject}: dtype is no type of numbers; fix it")


def check_tensors(model: str, config: PretrainedConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Compare layers, hidden size and vocabulary with a checkpoint's tensors, before a model is built of them.

    shapes: of every tensor by name. Raises PopcompileError where they are of another model. What this lets pass is
    compared tensor by tensor once the model is traced.
    """
    numbered: dict[str, set[str]] = defaultdict(set)
    for name in shapes:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                numbered[".".join(parts[:i])].add(part)
    layers, stored = config.num_hidden_layers, max(map(len, numbered.values()), default=0)
    if layers > stored:
        raise PopcompileError(
            f"{model}: config.json says {layers} layers, the checkpoint has tensors of {stored};"
            " config and weights belong to different models, or files are missing"
        )
    sizes = {size for shape in shapes.values() for size in shape}
    for name in ("hidden_size", "vocab_size"):
        if (size := getattr(config, name, None)) is not None and size not in sizes:
            raise PopcompileError(
                f"{model}: config.json says {name} {size}, which no tensor of the checkpoint has;"
                " config and weights belong to different models"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a type; of a type that JSON cannot hold anything is."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(part) for part in arguments)  # the libraries know values that they do not name
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _fits(value, arguments[0])
    plain = origin or hint
    if not isinstance(plain, type):
        return True
    if plain is bool:
        return isinstance(value, bool)
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if plain is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOATS
    if plain is str:
        return isinstance(value, str)
    if issubclass(plain, enum.Enum):
        return isinstance(value, str | int) and value in [member.value for member in plain]
    if typing.is_typeddict(plain) or dataclasses.is_dataclass(plain):
        hints = hints_of(plain)
        return isinstance(value, dict) and all(_fits(v, hints[k]) for k, v in value.items() if k in hints)
    if issubclass(plain, Mapping):
        return isinstance(value, dict) and all(_fits(v, a) for a in arguments[1:] for v in value.values())
    if issubclass(plain, Sequence | set | frozenset):
        inner = [a for a in arguments if a is not Ellipsis]
        if plain is tuple and len(inner) == len(arguments) > 0:
            return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
        infinite = (math.inf, -math.inf) if float in inner else ()  # limits, in configs of state-space models
        return isinstance(value, list) and all(_fits(v, a) or v in infinite for a in inner for v in value)
    return True


_WORDS = {
    bool: "true or false", int: "an integer", float: "a number", str: "a string", types.NoneType: "null", None: "null",
    list: "a list", dict: "an object",
}  # fmt: skip

_ITEMS = {str: "strings", int: "integers", float: "numbers"}


def _words(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        plain = [a for a in arguments if not (isinstance(a, type) and issubclass(a, enum.Enum) and str in arguments)]
        return " or ".join(dict.fromkeys(map(_words, plain)))
    if origin is Literal:
        return " or ".join(json.dumps(part) for part in arguments)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _words(arguments[0])
    if isinstance(origin or hint, type) and issubclass(origin or hint, enum.Enum):
        return " or ".join(json.dumps(member.value) for member in origin or hint)
    if (origin or hint) in (list, set, Sequence) and arguments and arguments[0] in _ITEMS:
        return f"a list of {_ITEMS[arguments[0]]}"
    if typing.is_typeddict(hint) or dataclasses.is_dataclass(hint):
        return "an object with its fields"
    return _WORDS.get(origin or hint, f"{getattr(origin or hint, '__name__', 'of a known type')}")


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in JSON, with the name of the field that it stands in."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, content


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
