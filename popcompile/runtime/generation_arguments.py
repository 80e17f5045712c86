"""What transformers' `generate` takes and a compiled model does not, each by its name with a reason.

Whatever is not listed works as it does for transformers' own models (tests/runtime/test_generation_arguments.py holds
the list of every argument and every field against both).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from popcompile.errors import PopcompileError

_CACHE = "the graphs write a cache of their own in place"
_BEAMS = f"beam search is not supported, for {_CACHE} and beams reorder it; use greedy search or sampling (num_beams=1)"
_ASSISTED = f"assisted generation is not supported, for {_CACHE} and drafts are taken back from it"
_OUTPUTS = "the graphs return logits and a cache alone; ask the original model"
_BATCHING = "continuous batching is not supported; give prompts as one batch to generate"
_HUB = "custom_generate: a repository's code is never run; give a function"

#: fields of GenerationConfig: values that ask for nothing, and why others are refused
FIELDS: dict[str, tuple[tuple[object, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "penalty_alpha": ((0, 0.0), f"contrastive search is not supported, for {_CACHE} and it tries several tokens"),
    "dola_layers": ((), "DoLa generation is not supported, for the graphs return no layer's logits but the last's"),
    "prompt_lookup_num_tokens": ((), _ASSISTED),
    "assistant_early_exit": ((), _ASSISTED),
    "assistant_ensemble_weight": ((), _ASSISTED),
    "use_mtp": ((False,), _ASSISTED),
    "speculation_type": ((), _ASSISTED),
    "is_assistant": ((False,), _ASSISTED),
    "cache_implementation": (("dynamic",), f"cache_implementation is not supported, for {_CACHE}"),
    "cache_config": ((), f"cache_config is not supported, for {_CACHE}"),
    "max_cache_len": ((), f"max_cache_len is not supported, for {_CACHE}, which grows"),
    "prefill_chunk_size": ((), "prefill_chunk_size is not supported; the graphs work in blocks already"),
    "continuous_batching_config": ((), _BATCHING),
    "output_attentions": ((False,), f"output_attentions is not supported, for {_OUTPUTS}"),
    "output_hidden_states": ((False,), f"output_hidden_states is not supported, for {_OUTPUTS}"),
}

#: arguments of generate beside those fields, and of what it passes on
ARGUMENTS: dict[str, tuple[tuple[object, ...], str]] = {
    "assistant_model": ((), _ASSISTED),
    "assistant_tokenizer": ((), _ASSISTED),
    "synced_gpus": ((False,), "the model runs in one process; leave it out"),
    "position_ids": ((), "the graphs count positions themselves, from attention_mask; leave it out"),
    "inputs_embeds": ((), "the graphs take token ids; give input_ids"),
    "return_dict": ((True,), "use return_dict_in_generate"),
}


def require_supported(arguments: Mapping[str, Any], table: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    """Raises PopcompileError that names the first argument that asks for what a compiled model cannot do."""
    for name, (neutral, reason) in table.items():
        value = arguments.get(name)
        if value is not None and not any(value is n or (type(value) is type(n) and value == n) for n in neutral):
            raise PopcompileError(f"{name}: {reason}")


def require_function(custom_generate: object) -> None:
    if custom_generate is not None and not callable(custom_generate):
        raise PopcompileError(_HUB)


def unknown_arguments(
    arguments: Mapping[str, Any], forward: Callable[..., Any], others: Sequence[str] = ()
) -> list[str]:
    """Names of arguments that say something and that `forward` has no parameter for. others: that it takes as well."""
    known = {*inspect.signature(forward).parameters, *others}
    return [n for n, value in arguments.items() if n not in known and value is not None and value is not False]


def refused(reason: str) -> Callable[..., Any]:
    """A method of transformers' mixin that would go on where `generate` refuses."""

    def refuse(*_: object, **__: object) -> Any:
        raise PopcompileError(reason)

    return refuse


refuse_hub_code, refuse_batching = refused(_HUB), refused(_BATCHING)
