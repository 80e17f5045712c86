"""GGUF files: each is the model that llama.cpp computes, or is refused in a line that names what is not known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bad_input import refusal_to_open
from gguf_files import MODELS, PLAIN, logits_of, model_of, save_gguf, tensors_of, write_gguf
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import popcompile
from popcompile.frontend.gguf_architectures import ARCHITECTURES, NEUTRAL
from popcompile.frontend.gguf_config import llama3_scaling
from popcompile.frontend.source import Source, open_source, write_tokenizer


def loaded(source: Source) -> PreTrainedModel:
    """transformers' module of a source's config with its tensors."""
    model = AutoModelForCausalLM.from_config(source.config).eval()
    state = {name: source.read(name) for name in source.tensors()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert set(state) == {name for name, _ in model.named_parameters()}
    return model


# --- what a file says is what the model computes -------------------------------------------------------------------


def test_every_architecture_has_a_model() -> None:
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_file_is_the_module_that_it_was_made_from(architecture: str, tmp_path: Path) -> None:
    model = model_of(architecture)
    source = open_source(str(save_gguf(tmp_path / "x.gguf", architecture, model)))
    for name, parameter in model.named_parameters():
        assert torch.allclose(source.read(name), parameter, rtol=0, atol=1e-6), name  # norms: + 1 - 1
        assert source.tensors()[name].shape == parameter.shape
    assert torch.allclose(logits_of(loaded(source)), logits_of(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", MODELS)
def test_the_tokenizer_is_the_one_that_transformers_chooses(architecture: str, tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "x.gguf", architecture, model_of(architecture))
    chosen = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name, local_files_only=True)
    write_tokenizer("x", chosen, tmp_path / "chosen")
    files = open_source(str(path)).save_tokenizer(tmp_path / "ours")
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "chosen" / name).read_bytes()


def test_quantized_blocks_are_what_gguf_makes_of_them(gguf_llama: PreTrainedModel, tmp_path: Path) -> None:
    values = tensors_of("llama", gguf_llama)["blk.0.ffn_up.weight"]
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0) - values).max() < 0.01
    path = save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, tensors={"blk.0.ffn_up.weight": blocks})
    read = open_source(str(path)).read("model.layers.0.mlp.up_proj.weight").numpy()
    assert np.array_equal(read, gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))


def factors_of(base: float, dims: int, factor: float, low: float, high: float, original: int) -> NDArray[np.float32]:
    """rope_freqs.weight as `LlamaModel.generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py writes it."""
    factors = []
    for frequency in 1.0 / base ** (np.arange(0, dims, 2, dtype=np.float32) / dims):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def ggml_rope(
    base: float, dims: int, factor: float = 1.0, yarn: float = 0.0, original: int = 0,
    betas: tuple[float, float] = (32.0, 1.0), factors: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float64], float]:  # fmt: skip
    """Frequencies [dims / 2] and magnitude of `rope_yarn` and its callers in ggml; yarn is its ext_factor."""
    extrapolated = base ** (-np.arange(0, dims, 2) / dims) / (1.0 if factors is None else factors)
    interpolated, magnitude = extrapolated / factor, 1.0
    if not yarn:
        return interpolated, magnitude
    corrections = [dims * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in betas]
    low, high = max(0, math.floor(corrections[0])), min(dims - 1, math.ceil(corrections[1]))
    ramp = (1 - np.clip((np.arange(dims // 2) - low) / max(0.001, high - low), 0, 1)) * yarn
    return interpolated * (1 - ramp) + extrapolated * ramp, 1 + 0.1 * math.log(factor)


def rope_of(config: PreTrainedConfig) -> tuple[NDArray[np.float64], float]:
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double().numpy(), rotary.attention_scaling


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {}),
    "factor 1": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {"factor": 2.5}),
    "no type": ({"rope.scaling.factor": 2.0}, {"factor": 2.0}),
    "old key": ({"rope.scale_linear": 2.0}, {"factor": 2.0}),
    "base": ({"rope.freq_base": 1234.5}, {"base": 1234.5}),
    "no base": ({"rope.freq_base": None}, {"base": 1e4}),
    "yarn": (YARN, {"factor": 4.0, "yarn": 1.0, "original": 16}),
    "yarn, betas": (
        YARN | {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5},
        {"factor": 4.0, "yarn": 1.0, "original": 16, "betas": (4.0, 0.5)},
    ),
    "yarn of the whole context": (
        YARN | {"rope.scaling.original_context_length": None},
        {"factor": 4.0, "yarn": 1.0, "original": 64},
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_positions_are_scaled_as_in_ggml(case: str, gguf_llama: PreTrainedModel, tmp_path: Path) -> None:
    metadata, expected = SCALINGS[case]
    changes = {f"llama.{key}": value for key, value in metadata.items()}
    config = open_source(str(save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, changes))).config
    frequencies, magnitude = ggml_rope(**{"base": 5e5, "dims": 16} | expected)
    found, found_magnitude = rope_of(config)
    assert np.allclose(found, frequencies, rtol=1e-5, atol=0)
    assert found_magnitude == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize("published", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 4096)])
@pytest.mark.parametrize("dims", [64, 128])
def test_factors_of_published_models_are_recovered(published: tuple[float, float, float, int], dims: int) -> None:
    found = llama3_scaling(factors_of(5e5, dims, *published), 5e5)
    assert found is not None and found.pop("rope_type") == "llama3"
    assert tuple(found.values()) == published


def test_rope_factors_reach_the_package(tmp_path: Path) -> None:
    """As Llama 3.1 is stored: scaled logits, far from those without scaling."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = model_of(
        "llama", **PLAIN, rope_parameters=scaling | {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    )
    factors = factors_of(1e4, 16, 8.0, 1.0, 4.0, 32)
    frequencies, _ = rope_of(scaled.config)
    assert np.allclose(frequencies, ggml_rope(1e4, 16, factors=factors)[0], rtol=1e-5, atol=0)
    path = save_gguf(tmp_path / "x.gguf", "llama", scaled, tensors={"rope_freqs.weight": factors})
    popcompile.convert(path, tmp_path / "out", prune=0)
    ids = torch.randint(48, (1, 40), generator=torch.Generator().manual_seed(1))
    logits = popcompile.load(tmp_path / "out")(ids).logits[0]
    unscaled = model_of("llama", **PLAIN, rope_parameters={"rope_theta": 1e4})
    assert (logits_of(unscaled) - logits_of(scaled)).abs().max() > 1
    assert torch.allclose(logits, logits_of(scaled)[-len(logits) :], rtol=0, atol=1e-4)


def test_factors_of_ones_scale_nothing(gguf_llama: PreTrainedModel, gguf_file: Path, tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    source = open_source(str(save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, tensors=ones)))
    assert source.config.rope_parameters == open_source(str(gguf_file)).config.rope_parameters


def test_long_and_short_factors_of_phi3(tmp_path: Path) -> None:
    model = model_of("phi3")
    long, short = np.linspace(1, 9, 6, dtype=np.float32), np.linspace(1, 2, 6, dtype=np.float32)
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    keys = {"phi3.rope.scaling.original_context_length": 16, "phi3.rope.scaling.attn_factor": 1.25}
    config = open_source(str(save_gguf(tmp_path / "x.gguf", "phi3", model, keys, tensors))).config
    expected = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "long_factor": long.tolist(),
        "short_factor": short.tolist(), "original_max_position_embeddings": 16, "attention_factor": 1.25,
    }  # fmt: skip
    assert config.rope_parameters == expected
    assert config.original_max_position_embeddings == 16


def test_gemma3_scales_layers_of_full_attention_alone(tmp_path: Path) -> None:
    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0, "gemma3.rope.freq_base_swa": 5e3}
    path = save_gguf(tmp_path / "x.gguf", "gemma3", model_of("gemma3"), keys)
    rope = open_source(str(path)).config.rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 5e3}
    keys["gemma3.rope.scaling.type"] = "yarn"
    assert "gemma3.rope.scaling.type = 'yarn'" in refusal_to_open(
        save_gguf(tmp_path / "y.gguf", "gemma3", model_of("gemma3"), keys)
    )


@pytest.mark.parametrize(("architecture", "layers", "period"), [("gemma2", 46, 2), ("gemma3", 62, 6)])
def test_what_llama_cpp_knows_of_gemma(architecture: str, layers: int, period: int, tmp_path: Path) -> None:
    """The largest Gemma is told by its layers: attention is scaled by width / heads. Windows repeat by default."""
    pattern = {f"{architecture}.attention.sliding_window_pattern": None}
    for count, scale in {layers: 64 // 4, layers - 1: 32}.items():
        model = model_of(architecture, num_hidden_layers=count, layer_types=None)
        config = open_source(str(save_gguf(tmp_path / f"{count}.gguf", architecture, model, pattern))).config
        assert config.query_pre_attn_scalar == scale
        assert [kind == "full_attention" for kind in config.layer_types] == [
            (layer + 1) % period == 0 for layer in range(count)
        ]


# --- what is not known is refused by name --------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"llama.something_new": 3}, "the metadata have llama.something_new = 3, which popcompile does not"),
    "several": ({f"llama.new{i}": i for i in range(5)}, "llama.new0 = 0, llama.new1 = 1, llama.new2 = 2 and 2 more"),
    "another architecture's": ({"qwen2.rope.freq_base": 1e6}, "have qwen2.rope.freq_base = 1000000.0"),
    "escapes": ({"llama.new": "\x1b[31m\n"}, r"llama.new = '\x1b[31m\n'"),
    "window": ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window = 16"),
    "softcap": ({"llama.attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping = 50.0"),
    "final softcap": ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping = 30.0"),
    "experts": ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "llama.expert_count = 8"),
    "scales": ({"llama.logit_scale": 0.5, "llama.residual_scale": 0.2}, "llama.logit_scale = 0.5"),
    "attention scale": ({"llama.attention.scale": 0.1}, "llama.attention.scale = 0.1"),
    "not causal": ({"llama.attention.causal": False}, "llama.attention.causal = False"),
    "alibi": ({"llama.attention.max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias = 8.0"),
    "values of another size": ({"llama.attention.value_length": 32}, "llama.attention.value_length = 32"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count = 8"),
    "RoPE type": ({"llama.rope.scaling.type": "magic"}, "llama.rope.scaling.type = 'magic'"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type = 'longrope'"),
    "magnitude": ({"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor = 1.2"),
    "heads by layer": ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv is [2, 1]"),
    "no layers": ({"llama.block_count": 0}, "llama.block_count is 0"),
    "many layers": ({"llama.block_count": 10**9}, "block_count is 1000000000, the tensors are of 2 blocks"),
    "width": ({"llama.embedding_length": 128}, "embedding_length is 128, token_embd.weight has 64 columns"),
    "feed-forward": (
        {"llama.feed_forward_length": 97},
        "ffn_gate.weight make model.layers.0.mlp.gate_proj.weight with",
    ),
    "huge feed-forward": ({"llama.feed_forward_length": 2**31 - 1}, "the metadata ask for [2147483647, 64]"),
    "heads": ({"llama.attention.head_count": 2}, "the metadata ask for"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon is nan"),
    "base": ({"llama.rope.freq_base": math.inf}, "llama.rope.freq_base is inf"),
    "text": ({"llama.context_length": "long"}, "llama.context_length is 'long'"),
    "long": ({"llama.context_length": 2**30}, "llama.context_length is 1073741824"),
    "missing": ({"llama.context_length": None}, "the metadata lack llama.context_length"),
    "vocabulary": ({"llama.vocab_size": 47}, "vocab_size is 47, token_embd.weight has 48 rows"),
    "tokens": ({"tokenizer.ggml.tokens": ["x"] * 49}, "tokenizer.ggml.tokens is no list of at most 48 tokens"),
    "end": ({"tokenizer.ggml.eos_token_id": 48}, "tokenizer.ggml.eos_token_id is 48, the vocabulary has 48 tokens"),
    "split": ({"tokenizer.ggml.pre": "deepseek-llm"}, "tokenizer.ggml.pre = 'deepseek-llm'"),
    "space": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}, "add_space_prefix = False"),
    "whitespace": ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces = True"),
    "charsmap": ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "tokenizer.ggml.precompiled_charsmap = [1, 2]"),
    "adapter": ({"general.type": "adapter"}, "general.type is 'adapter'; give the GGUF file of a whole model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, gguf_llama: PreTrainedModel, tmp_path: Path) -> None:
    metadata, message = REFUSED[case]
    assert message in refusal_to_open(save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, metadata))


def test_keys_that_change_nothing(gguf_llama: PreTrainedModel, gguf_file: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {f"llama.{key}": values[-1] for key, values in NEUTRAL.items()}
    keys |= {"general.author": "A", "quantize.imatrix.entries_count": 3, "tokenizer.ggml.fim_pre_token_id": 7}
    keys |= {"llama.tensor_data_layout": "Meta AI original pth", "tokenizer.ggml.add_space_prefix": False}
    source = open_source(str(save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, keys)))
    assert source.config.to_dict() == open_source(str(gguf_file)).config.to_dict()


EXTRA: dict[str, tuple[str, NDArray[np.float32], str]] = {
    "bias": ("blk.0.attn_q.bias", np.ones(64, np.float32), "the file has blk.0.attn_q.bias, which llama of"),
    "unknown": ("blk.1.magic.weight", np.ones((2, 2), np.float32), "the file has blk.1.magic.weight, which llama of"),
    "factors": ("rope_freqs.weight", np.arange(1, 9, dtype=np.float32), "rope_freqs.weight holds RoPE factors that"),
    "NaN": ("rope_freqs.weight", np.full(8, np.nan, np.float32), "rope_freqs.weight holds other than positive"),
    "few": ("rope_freqs.weight", np.ones(7, np.float32), "rope_freqs.weight is no vector of 8 factors"),
    "long": ("rope_factors_long.weight", np.ones(8, np.float32), "the file has rope_factors_long.weight, which"),
    "shape": (
        "blk.1.attn_v.weight",
        np.ones((16, 64), np.float32),
        "blk.1.attn_v.weight make model.layers.1.self_attn",
    ),
    "another block": ("blk.2.attn_v.weight", np.ones(3, np.float32), "block_count is 2, the tensors are of 3 blocks"),
}


@pytest.mark.parametrize("case", EXTRA)
def test_tensors_that_do_not_belong(case: str, gguf_llama: PreTrainedModel, tmp_path: Path) -> None:
    name, values, message = EXTRA[case]
    assert message in refusal_to_open(save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, tensors={name: values}))


def test_missing_tensors_are_named(gguf_llama: PreTrainedModel, tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, leave_out=["blk.1.ffn_up.weight", "output_norm.weight"])
    assert "the file has no blk.1.ffn_up.weight, output_norm.weight; download" in refusal_to_open(path)


def test_architectures_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "falcon", {}, {"token_embd.weight": np.ones((48, 64), np.float32)})
    assert "GGUF architecture 'falcon'; popcompile reads llama, qwen2" in refusal_to_open(path)
