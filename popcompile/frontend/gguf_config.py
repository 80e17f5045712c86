"""The config of transformers that a GGUF file's metadata describe, or an error that names what cannot be kept.

transformers' own reader drops the keys that it does not know, RoPE scaling among them, and takes the config class's
defaults for what it did not read. Here every key is read, or has a value that changes nothing, or is refused.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from popcompile.errors import PopcompileError
from popcompile.frontend.gguf_architectures import (
    ARCHITECTURES,
    DESCRIPTIONS,
    GPT2_SPLITS,
    NEUTRAL,
    OWN_SPLITS,
    SPACE_PREFIX,
    TOKENIZER_NEUTRAL,
    TOKENIZER_READ,
    TOKENIZER_SILENT,
    Architecture,
)
from popcompile.frontend.gguf_header import Counted, GgufHeader
from popcompile.loading import reading

INSTEAD = "give the model's safetensors checkpoint"
LARGEST = 2**31 - 1
LONGEST = 2**24
"""Tokens of context: a package holds a table of positions."""
LLAMA3 = [(8.0, 8192), (32.0, 8192), (16.0, 8192)]
"""(factor, original_max_position_embeddings) of published models; low_freq_factor 1, high_freq_factor 4."""

ReadFactors = Callable[[str], NDArray[np.float32]]


def architecture_of(model: str, header: GgufHeader) -> Architecture:
    """Raises PopcompileError for an architecture that is not read, and for a file that is no model."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise PopcompileError(f"{model}: general.type is {_shown(kind)}; give the GGUF file of a whole model")
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise PopcompileError(f"{model}: the GGUF header is truncated or corrupt (no general.architecture)")
    if name not in ARCHITECTURES:
        raise PopcompileError(
            f"{model}: GGUF architecture {_shown(name)}; popcompile reads {', '.join(ARCHITECTURES)}; else {INSTEAD}"
        )
    return ARCHITECTURES[name]


def gguf_config(model: str, header: GgufHeader, read_factors: ReadFactors) -> tuple[PretrainedConfig, set[str]]:
    """The config, and the names of tensors that went into it.

    read_factors: the RoPE factors of a tensor, by its name.

    Raises:
        PopcompileError: a key that is missing, malformed, unknown, or asks for what transformers' module does not do.
    """
    return _Reader(model, header, read_factors).config()


class _Reader:
    def __init__(self, model: str, header: GgufHeader, read_factors: ReadFactors) -> None:
        self._model, self._header, self._read_factors = model, header, read_factors
        self._architecture = architecture_of(model, header)
        self._defaults = AutoConfig.for_model(self._architecture.model_type)
        self._prefix = f"{header.metadata['general.architecture']}."
        self._taken: set[str] = set()
        self._tensors: set[str] = set()

    def config(self) -> tuple[PretrainedConfig, set[str]]:
        fields = self._fields()
        self._require_known_keys()
        kind = self._architecture.model_type
        with reading(self._model, f"transformers {transformers.__version__} builds no {kind} config from the metadata"):
            config = AutoConfig.for_model(kind, **fields)
            config.architectures = [CAUSAL_LMS[kind]]
        for name, value in fields.items():
            if name != "partial_rotary_factor" and not _holds(getattr(config, name, None), value):
                raise PopcompileError(
                    f"{self._model}: transformers {transformers.__version__} has no {name} {_shown(value)} for {kind};"
                    f" {INSTEAD}"
                )
        return config, self._tensors

    def _fields(self) -> dict[str, Any]:
        architecture = self._architecture
        fields: dict[str, Any] = {name: self._required(key) for key, name in architecture.fields.items()}
        fields |= {name: self._number(key, zero=True) or None for key, name in architecture.optional.items()}
        fields |= architecture.fixed
        fields |= {name: self._has(tensor) for tensor, name in architecture.flags.items()}
        fields |= {name: not self._has(tensor) for tensor, name in architecture.absent_flags.items()}
        fields["tie_word_embeddings"] = "output.weight" not in self._header.tensors
        layers, width, heads = (
            fields[architecture.fields[key]] for key in ("block_count", "embedding_length", "attention.head_count")
        )
        self._require_sizes(layers, width)
        fields |= self._heads(width, heads)
        if architecture.window_period:
            fields["layer_types"] = self._layer_types(layers)
            wide = layers == architecture.width_scaled
            fields["query_pre_attn_scalar"] = width // heads if wide else fields["head_dim"]
        if architecture.rope:
            fields |= self._rope(fields)
        if fields.get("head_dim") == width // heads and not hasattr(self._defaults, "head_dim"):
            del fields["head_dim"]  # such a config derives it
        return fields | self._vocabulary()

    def _require_sizes(self, layers: int, width: int) -> None:
        """What is allocated by number is compared with the tensors first."""
        blocks = {name.split(".")[1] for name in self._header.tensors if name.startswith("blk.")}
        if len(blocks) != layers or blocks != {str(i) for i in range(layers)}:
            raise PopcompileError(
                f"{self._model}: block_count is {layers}, the tensors are of {len(blocks)} blocks; download it again"
            )
        embedding = self._header.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise PopcompileError(f"{self._model}: no matrix token_embd.weight; give the GGUF file of a whole model")
        if embedding.shape[1] != width:
            raise PopcompileError(
                f"{self._model}: embedding_length is {width}, token_embd.weight has {embedding.shape[1]} columns;"
                " download it again"
            )

    def _heads(self, width: int, heads: int) -> dict[str, int]:
        groups = self._number("attention.head_count_kv") or heads
        size = self._number("attention.key_length") or max(1, width // heads)
        if (values := self._number("attention.value_length")) not in (None, size):
            raise self._refused("attention.value_length", values)
        if self._architecture.rope:
            return {"num_key_value_heads": groups, "head_dim": size}
        if (groups, size) != (heads, width // heads):
            raise self._refused("attention.head_count_kv", groups)
        return {}

    def _layer_types(self, layers: int) -> list[str]:
        pattern = self._take("attention.sliding_window_pattern", self._architecture.window_period)
        if type(pattern) is int and 0 < pattern <= LARGEST:  # the last layer of every period has full attention
            pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
        if not isinstance(pattern, list) or len(pattern) != layers or not all(type(local) is bool for local in pattern):
            raise self._refused("attention.sliding_window_pattern", pattern)
        return ["sliding_attention" if local else "full_attention" for local in pattern]

    def _vocabulary(self) -> dict[str, Any]:
        size = self._header.tensors["token_embd.weight"].shape[0]
        if (stated := self._take("vocab_size", size)) != size:
            raise PopcompileError(
                f"{self._model}: vocab_size is {_shown(stated)}, token_embd.weight has {size} rows; download it again"
            )
        tokens = _length(self._header.metadata.get("tokenizer.ggml.tokens", []))
        if tokens is None or tokens > size:
            raise PopcompileError(
                f"{self._model}: tokenizer.ggml.tokens is no list of at most {size} tokens; download it again"
            )
        ids: dict[str, Any] = {"vocab_size": size}
        for name, short in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
            token = self._header.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if token is None:
                if (getattr(self._defaults, f"{short}_token_id", None) or 0) >= size:  # of another vocabulary
                    ids[f"{short}_token_id"] = None
                continue
            if type(token) is not int or not 0 <= token < (tokens or size):
                raise PopcompileError(
                    f"{self._model}: tokenizer.ggml.{name}_token_id is {_shown(token)}, the vocabulary has"
                    f" {tokens or size} tokens; download it again"
                )
            ids[f"{short}_token_id"] = token
        return ids

    # --- RoPE ---------------------------------------------------------------------------------------------------

    def _rope(self, fields: dict[str, Any]) -> dict[str, Any]:
        head, context = fields["head_dim"], fields["max_position_embeddings"]
        base = self._number("rope.freq_base") or 10_000.0
        rotated = self._number("rope.dimension_count") or head
        if rotated % 2 or rotated > head or (rotated != head and not self._architecture.partial_rotary):
            raise self._refused("rope.dimension_count", rotated)
        rope = {"rope_theta": float(base)} | self._scaling(float(base), rotated, context)
        more: dict[str, Any] = {}
        if self._architecture.partial_rotary:
            rope["partial_rotary_factor"] = more["partial_rotary_factor"] = rotated / head
            if int(head * (rotated / head)) != rotated:
                raise self._refused("rope.dimension_count", rotated)
        if rope["rope_type"] == "longrope":
            more["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if not self._architecture.local_rope:
            return more | {"rope_parameters": rope}
        if rope["rope_type"] not in ("default", "linear"):  # of llama.cpp's scalings, this one alone leaves windows be
            raise self._refused("rope.scaling.type", rope["rope_type"])
        local = {"rope_type": "default", "rope_theta": float(self._number("rope.freq_base_swa") or 10_000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}

    def _scaling(self, base: float, rotated: int, context: int) -> dict[str, Any]:
        """`rope_parameters` of transformers without the base: what ggml_rope_ext computes."""
        factor = self._number("rope.scaling.factor", zero=True) or self._number("rope.scale_linear", zero=True) or 1.0
        original = self._number("rope.scaling.original_context_length") or context
        magnitude = self._number("rope.scaling.attn_factor") or 1.0
        kind = self._take("rope.scaling.type", "linear")  # llama.cpp's default
        if kind == "none":
            kind, factor = "linear", 1.0
        if self._architecture.rope_factors == "longrope":
            long, short = (self._factors(f"rope_factors_{length}.weight", rotated) for length in ("long", "short"))
            if long is not None and short is not None and kind in ("linear", "longrope") and factor == 1:
                return {
                    "rope_type": "longrope",
                    "long_factor": [float(value) for value in long],
                    "short_factor": [float(value) for value in short],
                    "original_max_position_embeddings": original,
                    "attention_factor": float(magnitude),
                }
        if kind == "yarn":
            scaling = {
                "rope_type": "yarn",
                "factor": float(factor),
                "original_max_position_embeddings": original,
                "beta_fast": float(self._number("rope.scaling.yarn_beta_fast") or 32.0),
                "beta_slow": float(self._number("rope.scaling.yarn_beta_slow") or 1.0),
                "attention_factor": magnitude * (1 + 0.1 * math.log(factor)) if factor > 1 else float(magnitude),
            }
        elif kind != "linear":
            raise self._refused("rope.scaling.type", kind)
        elif magnitude != 1.0:
            raise self._refused("rope.scaling.attn_factor", magnitude)
        else:
            scaling = {"rope_type": "linear", "factor": float(factor)} if factor != 1 else {"rope_type": "default"}
        if self._architecture.rope_factors != "llama3":
            return scaling
        factors = self._factors("rope_freqs.weight", rotated)
        if factors is None or np.all(factors == 1.0):
            return scaling
        found = llama3_scaling(factors, base)
        if scaling["rope_type"] != "default" or found is None:
            raise PopcompileError(
                f"{self._model}: rope_freqs.weight holds RoPE factors that are no scaling of llama3; {INSTEAD}"
            )
        return found

    def _factors(self, tensor: str, rotated: int) -> NDArray[np.float32] | None:
        if tensor not in self._header.tensors:
            return None
        if self._header.tensors[tensor].shape != (rotated // 2,):
            raise PopcompileError(f"{self._model}: {tensor} is no vector of {rotated // 2} factors; download it again")
        self._tensors.add(tensor)
        factors = self._read_factors(tensor)
        if not np.all(np.isfinite(factors) & (factors > 0)):
            raise PopcompileError(f"{self._model}: {tensor} holds other than positive numbers; download it again")
        return factors

    # --- keys ---------------------------------------------------------------------------------------------------

    def _has(self, tensor: str) -> bool:
        return f"blk.0.{tensor}" in self._header.tensors

    def _take(self, key: str, default: Any = None) -> Any:
        self._taken.add(self._prefix + key)
        return self._header.metadata.get(self._prefix + key, default)

    def _number(self, key: str, zero: bool = False) -> Any:
        """A positive number, or None where the file does not have the key."""
        value = self._take(key)
        if value is None:
            return None
        largest = LONGEST if key == "context_length" else LARGEST
        if type(value) not in (int, float) or not (0 if zero else 1e-30) <= value <= largest:  # NaN fails here
            raise PopcompileError(f"{self._model}: {self._prefix}{key} is {_shown(value)}; download the file again")
        integer = "rope." not in key and "epsilon" not in key and "softcapping" not in key
        if (integer or key.endswith(("_count", "_length"))) and type(value) is not int:
            raise PopcompileError(f"{self._model}: {self._prefix}{key} is {_shown(value)}; download the file again")
        return value

    def _required(self, key: str) -> Any:
        if (value := self._number(key)) is None:
            raise PopcompileError(f"{self._model}: the metadata lack {self._prefix}{key}; download the file again")
        return value

    def _refused(self, key: str, value: Any) -> PopcompileError:
        return PopcompileError(
            f"{self._model}: the metadata have {self._prefix}{key} = {_shown(value)}, which"
            f" {self._architecture.model_type} of transformers does not do; {INSTEAD}"
        )

    def _require_known_keys(self) -> None:
        neutral = {self._prefix + key: values for key, values in {**NEUTRAL, **self._architecture.neutral}.items()}
        neutral |= TOKENIZER_NEUTRAL
        unknown = []
        for key, value in self._header.metadata.items():
            if key in self._taken or key in TOKENIZER_READ or key in TOKENIZER_SILENT or key.startswith("split."):
                continue
            if key.startswith((*DESCRIPTIONS, "tokenizer.chat_template.")):
                continue
            if key == "tokenizer.ggml.add_space_prefix":  # below
                continue
            if not any(type(value) in (type(same), int, float) and value == same for same in neutral.get(key, ())):
                unknown.append(f"{key} = {_shown(value)}")
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise PopcompileError(
                f"{self._model}: the metadata have {', '.join(unknown[:3])}{more}, which popcompile does not know;"
                f" {INSTEAD}"
            )
        self._require_known_tokenizer()

    def _require_known_tokenizer(self) -> None:
        metadata = self._header.metadata
        for key, kind in TOKENIZER_READ.items():
            if key in metadata and not _is(metadata[key], kind):
                raise PopcompileError(f"{self._model}: {key} is {_shown(metadata[key])}; download the file again")
        if "tokenizer.ggml.tokens" not in metadata:
            return
        model, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
        prefix = SPACE_PREFIX.get(self._prefix[:-1], True)
        refused = None
        if model not in ("gpt2", "llama"):
            refused = f"tokenizer.ggml.model = {_shown(model)}"
        elif model == "gpt2" and split not in OWN_SPLITS | GPT2_SPLITS:
            refused = f"tokenizer.ggml.pre = {_shown(split)}"
        elif model == "llama" and metadata.get("tokenizer.ggml.add_space_prefix", prefix) is not prefix:
            refused = f"tokenizer.ggml.add_space_prefix = {_shown(metadata['tokenizer.ggml.add_space_prefix'])}"
        if refused:
            raise PopcompileError(
                f"{self._model}: the metadata have {refused}, and transformers' tokenizer splits text otherwise;"
                f" {INSTEAD}"
            )


def llama3_scaling(factors: NDArray[np.float32], base: float) -> dict[str, Any] | None:
    """`rope_parameters` of type llama3 that scale frequencies as `factors` [rotated / 2] do, or None.

    llama.cpp divides each frequency by its factor, which its converter computed from the four parameters that are
    searched for here. What is found reproduces every factor, so no other parameters would give another model.
    """
    dims = 2 * len(factors)
    wavelengths = 2 * np.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    largest = float(factors.max())
    guesses = [(factor, original, 1.0, 4.0) for factor, original in LLAMA3]
    guesses += [
        (largest, 2**power, low, high)
        for power in range(4, 24)
        for low in (1.0, 2.0)
        for high in (4.0, 2.0, 8.0, 16.0)
        if low < high
    ]
    for factor, original, low, high in guesses:
        smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _holds(found: Any, asked: Any) -> bool:
    """Whether a config's value is what was asked for; transformers adds keys to dictionaries."""
    if isinstance(asked, dict) and isinstance(found, dict):
        return all(_holds(found.get(key), value) for key, value in asked.items())
    return bool(found == asked)


def _length(array: Any) -> int | None:
    if isinstance(array, Counted):
        return array.length
    return len(array) if isinstance(array, list) else None


def _is(value: Any, kind: type | str) -> bool:
    """Whether metadata have a type, or are an array of "texts" or "numbers"."""
    if isinstance(kind, type):
        return type(value) is kind
    texts = kind == "texts"
    if isinstance(value, Counted):
        return value.texts == texts
    return isinstance(value, list) and all((type(v) is str) if texts else (type(v) in (int, float)) for v in value)


def _shown(value: Any) -> str:
    """A value of a file on one line, escaped."""
    text = f"an array of {value.length}" if isinstance(value, Counted) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
