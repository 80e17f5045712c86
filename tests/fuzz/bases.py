"""What is damaged: a tiny model in every form, made by the product's own commands, and its right answers.

model/  sharded/        a checkpoint in one file, and in shards
split/ unified/ int4/   packages of it
adapter/  gguf/         a LoRA for it, and the same weights as llama.cpp names them
logits.npz              of a prompt, by base: what package_logits and transformers_logits give
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_input import save_model
from peft import IA3Config, LoraConfig, PeftConfig

from fuzz.packages import COMMANDS, QUESTIONS

PROMPT = [3, 4, 5, 60, 21, 4, 9]
PACKAGES: dict[str, dict[str, Any]] = {
    "split": {}, "unified": {"layout": "unified", "window": 3}, "int4": {"dtype": "int4"},
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}),
    "moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}
#: of tensors of the GGUF file, the others are fp32
QUANTIZED = {"attn_output": "Q8_0", "ffn_gate": "Q4_0", "ffn_up": "F16"}


def make_bases(folder: Path, packages: list[str], ready: Path | None = None) -> None:
    """Write the bases into `folder`. ready: a split package of save_model's model, if there is one already."""
    from popcompile.conversion import convert

    model = save_model(folder / "model")
    _shard(model, folder / "sharded")
    for name, (kind, changes) in FAMILIES.items():
        _family(model, folder / name, kind, changes)
    targets = ["q_proj", "v_proj", "down_proj"]
    _adapter(model, folder / "adapter", LoraConfig(r=4, target_modules=targets))
    _adapter(model, folder / "ia3", IA3Config(target_modules=targets, feedforward_modules=["down_proj"]))
    _gguf(model, folder / "gguf")
    for name in packages:
        if name == "split" and ready is not None:
            shutil.copytree(ready, folder / name)
        else:
            convert(model, folder / name, prune=1, kv_projection="layer", **{"window": 2} | PACKAGES[name])
    logits = {name: package_logits(folder / name) for name in packages}
    (folder / "answers.json").write_text(json.dumps({name: _answers(folder / name) for name in packages}))
    logits["model"] = transformers_logits(model)
    logits["gguf"] = transformers_logits(folder / "gguf", gguf_file="model.gguf")
    np.savez(folder / "logits.npz", **logits)


def key(command: list[str]) -> str:
    """A command on a package, without its name."""
    return " ".join([command[0], *command[2:]])


def _answers(package: Path) -> dict[str, str]:
    """stdout of every `run` that cases take."""
    from popcompile.cli import main

    found = {}
    for _, *options in (command for command in COMMANDS if command[0] == "run"):
        command = ["run", str(package), *options[1:]]
        before, sys.stdin = sys.stdin, io.StringIO(QUESTIONS)
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            status = main(command)
        sys.stdin = before
        if status == 0:  # a unified package has no full prefill
            found[key(command)] = said.getvalue()
    return found


def package_logits(folder: Path) -> np.ndarray:
    """[2 * prompt, vocabulary]: of the whole model, and, the last row, of the pruned prefill."""
    import popcompile

    loaded = popcompile.load(folder)
    ids = torch.tensor([PROMPT]) % loaded.manifest.vocab_size
    pruned = loaded(ids, prefill="pop", logits_to_keep=1).logits[0].float().numpy()
    if "decode" not in loaded.manifest.graphs:
        return pruned
    return np.concatenate([loaded(ids).logits[0].float().numpy(), pruned])


def transformers_logits(folder: Path, adapter: Path | None = None, **options: Any) -> np.ndarray:
    """[prompt, vocabulary], in fp32. Raises what transformers and PEFT raise, and ValueError where tensors lack."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"transformers lacks {sorted(info['missing_keys'])[:1]} {sorted(info['mismatched_keys'])[:1]}")
    if adapter is not None:
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(shutil.copytree(adapter, Path(temporary, "adapter")))
            config = json.loads((plain / "adapter_config.json").read_bytes())
            config |= {"task_type": None, "megatron_config": None}  # about how a model is run; they change no weight
            (plain / "adapter_config.json").write_text(json.dumps(config))
            model = PeftModel.from_pretrained(model, plain).merge_and_unload()
    with torch.no_grad():
        ids = torch.tensor([PROMPT]) % model.config.vocab_size
        logits = model.eval()(ids).logits[0].float().numpy()
    return np.asarray(logits)


def _shard(model: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map, count = {}, 3
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[shard::count]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _family(model: Path, folder: Path, kind: str, changes: dict[str, Any]) -> None:
    """The Llama's sizes and tokenizer, another family's module."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = json.loads((model / "config.json").read_bytes())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    torch.manual_seed(2)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = CONFIG_MAPPING[kind](**{name: sizes[name] for name in names} | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _adapter(model: Path, folder: Path, config: PeftConfig) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.3
    adapted.save_pretrained(folder)


def _gguf(model: Path, folder: Path) -> None:
    import gguf
    import gguf.quants
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_bytes())
    letters = ["<unk>", "<s>", "</s>", "c", "a", "t", "ca", "cat"]
    vocabulary = letters + [f"w{i}" for i in range(config["vocab_size"] - len(letters))]
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges(["c a", "ca t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "output": "lm_head",
    }  # fmt: skip
    state = load_file(model / "model.safetensors")
    for short, long in names.items():
        for layer in [None] if long.startswith("model.") or long == "lm_head" else range(config["num_hidden_layers"]):
            source = f"{long}.weight" if layer is None else f"model.layers.{layer}.{long}.weight"
            target = f"{short}.weight" if layer is None else f"blk.{layer}.{short}.weight"
            tensor = state[source]
            if short in ("attn_q", "attn_k"):  # llama.cpp keeps rotary pairs side by side
                heads = config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            kind = gguf.GGMLQuantizationType[QUANTIZED.get(short, "F32")]
            packed = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
