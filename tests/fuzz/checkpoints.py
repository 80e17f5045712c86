"""Damaged checkpoints: configs by themselves, and safetensors files, their indices, tokenizers and other files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.case import AUTO_MAP, Case, Workspace
from fuzz.hostile import HUGE, damage, damage_bytes, damage_text, dumps, short

MODEL = "model"
ANALYZE = ["--texts", "1", "--tokens", "8", "--json"]
#: how often each command is taken; `--prune 99` ends when the checkpoint is open, for the model has two layers
COMMANDS: dict[tuple[str, ...], int] = {
    ("convert", MODEL, "out", "--prune", "99"): 12,
    ("analyze", MODEL, *ANALYZE): 4,
    ("convert", MODEL, "out", "--random-weights", "--prune", "1"): 1,
    ("convert", MODEL, "out", "--kv-projection", "layer", "--prune", "1"): 2,
}

#: fields that decide what is computed, or how large it is, and values of the right type for some
FIELDS: dict[str, list[Any]] = {
    "architectures": [["GPT2LMHeadModel"], ["LlamaForSequenceClassification"], "LlamaForCausalLM", []],
    "model_type": ["gpt2", "qwen2", "mistral", "gemma", "gemma3_text", "phi3", "bert", "t5", "whisper", "mamba",
                   "llava",
                   "LLAMA", "qwen3_moe", "gpt_oss", "falcon", "bloom", "cohere", "olmo2", "deepseek_v3"],
    "num_hidden_layers": [0, 1, 3, 10**9, HUGE],
    "hidden_size": [0, 1, 31, 33, 64, 10**9, HUGE],
    "intermediate_size": [0, 1, 65, 10**9, HUGE],
    "num_attention_heads": [0, 1, 3, 5, 8, 10**9],
    "num_key_value_heads": [0, 1, 3, 4, 8, None, 10**9],
    "head_dim": [0, 1, 7, 16, None, 10**9],
    "vocab_size": [0, 1, 127, 129, 10**9, HUGE],
    "max_position_embeddings": [0, 1, 2, 63, 10**9, HUGE],
    "rms_norm_eps": [0.0, 1.0, -1.0, 1e-30],
    "rope_theta": [0.0, 1.0, -5.0, 1e30],
    "rope_parameters": [{"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, {"rope_type": "default"}, {},
                        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, {"rope_type": "x", "rope_theta": 1e4},
                        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, {"rope_theta": "x"},
                        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16, "rope_theta": 1e4},
                        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                                                   "rope_theta": 1e4}],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 0.0}, {"factor": 2.0},
                     {"rope_type": "linear", "factor": "2"}, {"type": "su"}, "linear", [2.0]],
    "hidden_act": ["gelu", "relu", "swish", "nothing", "", "gelu_new", "softmax"],
    "attention_bias": [True, "false"],
    "mlp_bias": [True],
    "tie_word_embeddings": [True, "true", 1],
    "sliding_window": [0, 4, -1, HUGE],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"] * 3, ["x", "y"],
                    "full_attention"],
    "dtype": ["float16", "bfloat16", "float64", "int8", "x", "float8_e4m3fn"],
    "torch_dtype": ["float16", "x", 3],
    "pad_token_id": [-1, 5, HUGE],
    "eos_token_id": [[2, 3], -1, HUGE, [], ["</s>"]],
    "bos_token_id": [-1, HUGE, [1]],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}, {}, {"quant_method": "fp8"}, "gptq", [1]],
    "text_config": [{}, {"model_type": "llama"}, {"model_type": "llama", "hidden_size": 8}, "llama"],
    "pretraining_tp": [2, 0], "partial_rotary_factor": [0.5, 0.0, 2.0], "initializer_range": [-1.0, 1e30],
    "attention_dropout": [0.5, 2.0], "use_cache": [False], "is_decoder": [True], "is_encoder_decoder": [True],
    "output_attentions": [True], "output_hidden_states": [True], "return_dict": [False], "num_labels": [0, -1, 10**7],
    "id2label": [{"0": "a"}, {"x": "a"}, []], "label2id": [{"a": 0}], "transformers_version": ["99.0", 5],
    "torchscript": [True], "pruned_heads": [{"0": [1]}], "chunk_size_feed_forward": [3],
                    "attn_implementation": ["eager", "x"],
    "_name_or_path": ["../outside"],
                             "base_model_tp_plan": [{"x": "y"}],
    # of the other families
    "query_pre_attn_scalar": [0, -1, 8.5, HUGE], "final_logit_softcapping": [0.0, 30.0, -1.0, "x"],
    "attn_logit_softcapping": [0.0, 50.0, "x"], "use_bidirectional_attention": [True, "all"],
    "sliding_window_pattern": [0, 1, 6], "rope_local_base_freq": [0.0, 1e4],
    "num_experts": [0, 1, 3, 8, 10**9], "num_experts_per_tok": [0, 1, 4, 5, 10**9], "norm_topk_prob": [True, "x"],
    "moe_intermediate_size": [0, 15, 10**9], "decoder_sparse_step": [0, 2, -1], "mlp_only_layers": [[0], [7], 0, ["x"]],
    "shared_expert_intermediate_size": [16], "output_router_logits": [True], "router_aux_loss_coef": [1.0, "x"],
}  # fmt: skip


def copy_model(rng: Random, workspace: Workspace, *bases: str) -> tuple[Path, str]:
    """A checkpoint to damage; the kinds differ in layout only."""
    base = rng.choice(bases or ("model", "model", "sharded", "gemma3", "moe"))
    shutil.copytree(workspace.bases / base, workspace.root / MODEL)
    return workspace.root / MODEL, base


def command(rng: Random) -> list[str]:
    return list(rng.choices(list(COMMANDS), list(COMMANDS.values()))[0])


def case(words: str, parts: list[str], base: str, expect: str = "transformers") -> Case:
    if "99" in parts:
        expect = "refused"
    elif "--random-weights" in parts and expect == "transformers":
        expect = "any"
    out = ["out"] if parts[0] == "convert" else []
    package = "out" if out else None
    return Case(words, parts, expect, base=base, model=MODEL, package=package, out=out)


def make_config(rng: Random, workspace: Workspace) -> Case:
    """config.json alone."""
    model, base = copy_model(rng, workspace)
    path = model / "config.json"
    content, how = json.loads(path.read_bytes()), rng.random()
    if how < 0.1:
        damaged, words = damage_text(path.read_bytes(), rng)
        path.write_bytes(damaged)
    elif how < 0.5:
        fields = rng.sample(list(FIELDS), rng.choice([1, 1, 2]))
        changes = {field: rng.choice(FIELDS[field]) for field in fields}
        path.write_bytes(dumps(content | changes))
        words = ", ".join(f"{field} = {short(value)}" for field, value in changes.items())
    elif how < 0.57:
        return _foreign(rng, workspace, model, base)
    else:
        damaged, words, _ = damage(
            content, rng, focus=[(field,) for field in FIELDS if field in content or rng.random() < 0.1]
        )
        path.write_bytes(dumps(damaged))
    return case(f"config.json: {words}", command(rng), base)


def make(rng: Random, workspace: Workspace) -> Case:
    """All files but config.json."""
    model, base = copy_model(rng, workspace)
    choices: dict[Callable[..., Case], int] = {_header: 5, _raw: 3, _index: 3, _other: 4, _tensors: 2, _foreign: 1}
    return rng.choices(list(choices), list(choices.values()))[0](rng, workspace, model, base)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = dumps(header)
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def damage_safetensors(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Damage to the header: a value in it, its length, or how it fits the data."""
    header, data = split(content)
    how = rng.randrange(6)
    if how == 0:
        length = rng.choice([0, 1, 8, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001])
        return joined(header, data, length), f"header of {length} bytes"
    if how == 1:
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        entry = header[name]
        key = rng.choice(["dtype", "shape", "data_offsets"])
        begin, end = entry["data_offsets"]
        entry[key] = rng.choice({
            "dtype": ["F16", "BF16", "F64", "I8", "I64", "F8_E4M3", "F8_E5M2", "BOOL", "U16", "F4", "C64", "x", ""],
            "shape": [[], [0], [*entry["shape"], 1], entry["shape"][::-1], [2**32, 2**32], [2**63], [-1], [HUGE, 0]],
            "data_offsets": [[0, 0], [begin, end + 4], [end, begin], [0, end - begin], [2**63, 2**64 - 1], [begin],
                             [-4, 0]],
        }[key])  # fmt: skip
        return joined(header, data), f"{name}: {key} = {short(entry[key])}"
    if how == 2:
        one, other = rng.sample([name for name in header if name != "__metadata__"], 2)
        header[one], header[other] = header[other], header[one]
        return joined(header, data), f"{one} and {other} exchanged"
    if how == 3:
        text, words = damage_text(dumps(header), rng)
        return struct.pack("<Q", len(text)) + text + data, f"header {words}"
    damaged, words, _ = damage(header, rng)
    return joined(damaged, data), f"header: {words}"


def _header(rng: Random, workspace: Workspace, model: Path, base: str) -> Case:
    path = rng.choice(sorted(model.glob("*.safetensors")))
    content, words = damage_safetensors(path.read_bytes(), rng)
    path.write_bytes(content)
    return case(f"{path.name}: {words}", command(rng), base)


def _raw(rng: Random, workspace: Workspace, model: Path, base: str) -> Case:
    path = rng.choice(sorted(model.glob("*.safetensors")))
    content, words = damage_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return case(f"{path.name}: {words}", command(rng), base)


def _index(rng: Random, workspace: Workspace, model: Path, base: str) -> Case:
    path = model / "model.safetensors.index.json"
    if not path.is_file():  # of a single file: one that disagrees with it
        header, _ = split((model / "model.safetensors").read_bytes())
        path.write_bytes(dumps({"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")}))
    if rng.random() < 0.3:
        content, words = damage_text(path.read_bytes(), rng)
        path.write_bytes(content)
        return case(f"{path.name}: {words}", command(rng), base)
    document = json.loads(path.read_bytes())
    tensor = rng.choice(sorted(document["weight_map"]))
    if rng.random() < 0.5:
        file = rng.choice(["../outside/secret", "/dev/zero", "", ".", "..", "config.json", "a" * 5000, "a\x00b",
                           "x/../y",
                           "\ud800", "model-00001-of-00009.safetensors", "\x1b[2J.safetensors"])  # fmt: skip
        document["weight_map"][tensor] = file
        words = f"{tensor} is in {short(file)}"
    else:
        document, words, _ = damage(document, rng, focus=[("weight_map",), ("weight_map", tensor), ("metadata",)])
    path.write_bytes(dumps(document))
    return case(f"{path.name}: {words}", command(rng), base)


def _other(rng: Random, workspace: Workspace, model: Path, base: str) -> Case:
    """generation_config.json and the tokenizer's files."""
    name = rng.choice(["generation_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
    path = model / name
    if rng.random() < 0.25:
        content, words = damage_text(path.read_bytes(), rng)
        path.write_bytes(content)
    else:
        focus = {
            "generation_config.json": [(f,) for f in ("eos_token_id", "max_length", "temperature",
                                       "cache_implementation",
                                                      "num_beams", "do_sample", "transformers_version",
                                                      "bos_token_id")],
            "tokenizer_config.json": [(f,) for f in ("tokenizer_class", "model_max_length", "eos_token",
                                      "chat_template",
                                                     "added_tokens_decoder", "extra_special_tokens", "backend")],
            "tokenizer.json": [("model",), ("model", "type"), ("model", "vocab"), ("added_tokens",), ("pre_tokenizer",),
                               ("normalizer",), ("post_processor",), ("decoder",), ("truncation",), ("version",)],
        }[name]  # fmt: skip
        damaged, words, _ = damage(json.loads(path.read_bytes()), rng, focus=focus)
        path.write_bytes(dumps(damaged))
    return case(f"{name}: {words}", command(rng), base)


def _tensors(rng: Random, workspace: Workspace, model: Path, base: str) -> Case:
    """Whole tensors: gone, renamed, of another type or shape, NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    path = rng.choice(sorted(model.glob("*.safetensors")))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    how = rng.randrange(8)
    tensor = tensors.pop(name)
    if how == 0:
        words = "is gone"
    elif how == 1:
        other = rng.choice(
            ["model.norm.bias", "x", f"language_model.{name}", f"_orig_mod.{name}", name.upper(), name + "_scale"]
        )
        tensors[other] = tensor
        words = f"is called {other}"
    elif how == 2:
        kind = rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
        tensors[name] = tensor.to(kind)
        words = f"is {kind}"
    elif how == 3:
        tensors[name] = tensor[..., :-1].contiguous()
        words = "is a column short"
    elif how == 4:
        tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 3e38, 0.0, 1e-40]))
        words = f"is all {tensors[name].flatten()[0]}"
    elif how == 5:
        tensors[name] = tensor[None]
        words = "has a dimension more"
    elif how == 6:
        tensors |= {name: tensor, "model.layers.7.mlp.up_proj.weight": torch.zeros(64, 32), "extra": torch.zeros(3)}
        words = "and two that no model has"
    else:
        tensors |= {name: tensor, "lm_head.weight": torch.ones(128, 32), "lm_head.bias": torch.ones(128)}
        words = "and a head of ones with a bias"
    save_file(tensors, path, metadata={"format": "pt"})
    return case(f"{path.name}: {name} {words}", command(rng), base)


def _foreign(rng: Random, workspace: Workspace, model: Path, base: str) -> Case:
    """Code in the checkpoint, which runs with --trust-remote-code only."""
    workspace.trap(model / "trap.py")
    name = rng.choice(["config.json", "tokenizer_config.json", "generation_config.json"])
    changes: dict[str, Any] = {"auto_map": AUTO_MAP}
    if rng.random() < 0.5:
        changes |= {"model_type": "unheard", "architectures": ["Model"], "tokenizer_class": "Tokenizer"}
    if rng.random() < 0.3:
        changes["auto_map"] = {
            k: (f"{workspace.outside}--{v}" if isinstance(v, str) else v) for k, v in AUTO_MAP.items()
        }
        workspace.trap(workspace.outside / "trap.py")
    (model / name).write_bytes(dumps(json.loads((model / name).read_bytes()) | changes))
    return case(f"{name}: {', '.join(changes)} and a trap.py", command(rng), base)
