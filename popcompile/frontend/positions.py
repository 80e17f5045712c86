"""Which ways to tell a token's position are compiled, decided from the config.

Positions are learned embeddings or RoPE, whose tables are computed from the config when a model is converted. So what
the tables hold may depend on the position and, with longrope, on which of two lengths the prompt has.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from popcompile.errors import PopcompileError
from popcompile.rope import rope_types

ROPE_TYPES = ("default", "linear", "llama3", "longrope", "proportional", "yarn")
"""transformers' names of the kinds of RoPE that are compiled. Of the others, dynamic computes other frequencies for
every length."""


def require_positions(config: PretrainedConfig) -> None:
    """Raise PopcompileError for a config whose positions are not compiled, naming them."""
    for kind in rope_types(config):
        if kind not in ROPE_TYPES:
            raise PopcompileError(
                f"{config.model_type}: its RoPE has the type {str(kind)[:40]!r}; popcompile supports"
                f" {', '.join(ROPE_TYPES)}"
            )
    if _has_alibi(config):
        raise PopcompileError(
            f"{config.model_type}: its positions are ALiBi's biases of attention; popcompile supports RoPE and learned"
            " positions"
        )
    context_length(config)


def context_length(config: PretrainedConfig) -> int:
    """The most tokens of a sequence. Raises PopcompileError where the config does not say."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        given = "no max_position_embeddings" if length is None else f"max_position_embeddings {str(length)[:40]!r}"
        raise PopcompileError(
            f"{config.model_type}: its config has {given}; give it the number of tokens that the model was made for"
        )
    return length


def require_positions_from_zero(config: PretrainedConfig, model: nn.Module) -> None:
    """Raise PopcompileError for learned positions that begin behind the padding token's id, as RoBERTa's do.

    transformers counts so where it is given no positions, and from 0 where `generate` gives them.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            raise PopcompileError(
                f"{config.model_type}: its positions begin behind the padding token's id, as RoBERTa's do; popcompile"
                " supports positions that begin at 0"
            )


def _has_alibi(config: PretrainedConfig) -> bool:
    attention = getattr(config, "attn_config", None)  # MPT's
    return bool(
        getattr(config, "alibi", False) or getattr(attention, "alibi", False) or config.model_type in _ALIBI_ALWAYS
    )


_ALIBI_ALWAYS = frozenset({"bloom"})
"""Model types that have ALiBi without a field that says so."""
