"""Damaged adapters: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from fuzz.case import AUTO_MAP, Case, Workspace
from fuzz.checkpoints import ANALYZE, MODEL, damage_safetensors
from fuzz.hostile import HUGE, damage, damage_bytes, damage_text, dumps, short

ADAPTER = "adapter"
COMMANDS: dict[tuple[str, ...], int] = {
    ("convert", MODEL, "out", "--adapter", ADAPTER, "--prune", "99"): 12,
    ("analyze", MODEL, "--adapter", ADAPTER, *ANALYZE): 6,
    ("convert", MODEL, "out", "--adapter", ADAPTER, "--kv-projection", "layer", "--prune", "1"): 1,
}
FIELDS: dict[str, list[Any]] = {
    "peft_type": ["IA3", "PROMPT_TUNING", "LOHA", "OFT", "VERA", "XLORA", "X", "", "lora"],
    "r": [0, -1, 1, 3, 10**9, HUGE, 4.5],
    "lora_alpha": [0, -1, 1e30, HUGE],
    "target_modules": ["all-linear", [], ["nothing"], "*", "(", ".*", ["q_proj"], "(a+)+$", ["lm_head"], "a" * 3000],
    "exclude_modules": [["q_proj"], "(", ".*"],
    "modules_to_save": [["lm_head"], ["x"], "lm_head"],
    "rank_pattern": [{"q_proj": 2}, {"(": 2}, {"q_proj": 0}, {"q_proj": "x"}, {"q_proj": 10**9}],
    "alpha_pattern": [{"q_proj": 2}, {"(": 2}, {"q_proj": "x"}],
    "bias": ["all", "lora_only", "x"],
    "use_dora": [True], "use_rslora": [True], "use_qalora": [True], "fan_in_fan_out": [True],
    "layers_to_transform": [[0], [7], 0, "0", [-1]],
    "layers_pattern": ["layers", "x", "("],
    "layer_replication": [[[0, 2], [0, 2]], [[0, 10**9]]],
    "init_lora_weights": ["pissa", "eva", "corda", "loftq", "olora", "orthogonal", "pissa_niter_4", "x", False],
    "megatron_config": [{"x": 1}], "megatron_core": ["os"], "loftq_config": [{"bits": 4}], "eva_config": [{"x": 1}],
    "corda_config": [{"x": 1}], "trainable_token_indices": [[1], {"embed_tokens": [1]}, [HUGE]], "lora_bias": [True],
    "target_parameters": [["mlp.up_proj.weight"], ["x"]], "runtime_config": [{"ephemeral_gpu_offload": True}, "x"],
    "base_model_name_or_path": ["../outside", "/dev/zero", "nobody/nothing", 1], "revision": ["x", 1],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "trap"}, "x"], "inference_mode": [False],
    "task_type": ["X", "SEQ_CLS", 1], "alora_invocation_tokens": [[1]], "arrow_config": [{"x": 1}],
    "lora_dropout": [2.0, -1.0, "x"], "peft_version": ["99.0", 1], "ensure_weight_tying": [True],
                     "lora_ga_config": [{}],
}  # fmt: skip


def make(rng: Random, workspace: Workspace) -> Case:
    shutil.copytree(workspace.bases / "model", workspace.root / MODEL)
    adapter = Path(
        shutil.copytree(workspace.bases / rng.choice(["adapter", "adapter", "ia3"]), workspace.root / ADAPTER)
    )
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    how = rng.random()
    if how < 0.08:
        content, words = damage_text(config.read_bytes(), rng)
        config.write_bytes(content)
    elif how < 0.4:
        fields = rng.sample(list(FIELDS), rng.choice([1, 1, 2]))
        changes = {field: rng.choice(FIELDS[field]) for field in fields}
        config.write_bytes(dumps(json.loads(config.read_bytes()) | changes))
        words = ", ".join(f"{field} = {short(value)}" for field, value in changes.items())
    elif how < 0.7:
        damaged, words, _ = damage(json.loads(config.read_bytes()), rng, focus=[(field,) for field in FIELDS])
        config.write_bytes(dumps(damaged))
    elif how < 0.83:
        content, words = damage_safetensors(weights.read_bytes(), rng)
        weights.write_bytes(content)
    elif how < 0.9:
        content, words = damage_bytes(weights.read_bytes(), rng)
        weights.write_bytes(content)
    elif how < 0.95:
        words = _tensors(rng, weights)
    else:
        workspace.trap(adapter / "trap.py")
        config.write_bytes(dumps(json.loads(config.read_bytes()) | {"auto_map": AUTO_MAP, "auto_mapping": {
            "base_model_class": "Model", "parent_library": "trap"}}))  # fmt: skip
        words = "auto_map, auto_mapping and a trap.py"
    name = weights.name if 0.7 <= how < 0.95 else config.name
    parts = list(rng.choices(list(COMMANDS), list(COMMANDS.values()))[0])
    out = ["out"] if parts[0] == "convert" else []
    expect = "refused" if "99" in parts else "peft"
    return Case(f"{name}: {words}", parts, expect, base="model", model=MODEL, adapter=ADAPTER, out=out,
                package="out" if out else None)  # fmt: skip


def _tensors(rng: Random, path: Path) -> str:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    how = rng.randrange(5)
    if how == 0:
        words = "is gone"
    elif how == 1:
        other = rng.choice(["x", "base_model.model.lm_head.weight", name.replace("lora_A", "lora_C"), name + ".x", ""])
        tensors[other] = tensor
        words = f"is called {short(other)}"
    elif how == 2:
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.int8, torch.bool, torch.float64]))
        words = f"is {tensors[name].dtype}"
    elif how == 3:
        tensors[name] = rng.choice([tensor[None], tensor[:-1].contiguous(), tensor.T.contiguous(), tensor.flatten()])
        words = f"has shape {list(tensors[name].shape)}"
    else:
        tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 3e38]))
        words = f"is all {tensors[name].flatten()[0]}"
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {words}"
