"""Convert a checkpoint of Llama-3.1-8B's shape: python examples/convert_8b.py WORK [--layers 32] [--dtype fp16]

Writes 16 GB of random bf16 weights to WORK/checkpoint, in shards as on the hub, unless they are there; converts them to
WORK/package, with the layers' own K/V projections, which runs no forward pass; and prints how long the steps took and
the most memory that the conversion held. Needs 35 GB of disk. `--calibration FILE --tokenizer FOLDER` calibrates the
deepest third on text, read by the tokenizer of another model, and needs some GB more, and hours on two cores:
`--texts 16` makes it some minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tabulate import tabulate
from transformers import AutoTokenizer, LlamaConfig

from popcompile.package.manifest import REPORT, read_manifest

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_INTERVAL = 0.05  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoint and package")
    parser.add_argument("--layers", type=int, default=32, help="of the model (default 32)")
    parser.add_argument("--dtype", default="fp16", help="of the package (default fp16)")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--tokenizer", help="folder of a tokenizer of at most 128,256 tokens for it")
    parser.add_argument("--texts", default="104", help="pieces of the text (default 104)")
    options = parser.parse_args()
    checkpoint, package = options.work / "checkpoint", options.work / "package"
    config = LlamaConfig.from_dict(CONFIG | {"num_hidden_layers": options.layers})
    if not (checkpoint / "config.json").is_file():
        write_checkpoint(checkpoint, config)
    how = ["--prune", "1/3", "--kv-projection", "layer"]
    if options.calibration:
        AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True).save_pretrained(checkpoint)
        deepest = f"{options.layers * 2 // 3}-{options.layers - 1}"
        how = ["--layers", deepest, "--calibration", str(options.calibration), "--calibration-texts", options.texts]
        how += ["--refinement-steps", "0"]
    command = ["convert", str(checkpoint), str(package), *how, "--force", "--dtype", options.dtype]
    started = time.perf_counter()
    process = psutil.Popen([sys.executable, "-m", "popcompile", *command])
    held = resident = 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            break
        held, resident = max(held, _held(memory)), max(resident, memory.rss)
        time.sleep(_INTERVAL)
    seconds = time.perf_counter() - started
    if process.wait():
        raise SystemExit("the conversion failed")
    report = json.loads((package / REPORT).read_bytes())
    size = sum(file["size"] for file in read_manifest(package).files.values())
    rows = [
        ["conversion", f"{seconds:.0f} s"],
        ["- of that, passes", f"{sum(record['seconds'] for record in report['passes']):.0f} s"],
        ["most memory, mapped files left out", f"{held / 2**30:.2f} GiB"],
        ["most memory with these", f"{resident / 2**30:.2f} GiB"],
        ["package", f"{size / 1e9:.1f} GB"],
    ]
    print(tabulate(rows, tablefmt="plain"))


def _held(memory: Any) -> int:
    """Bytes that no file can give back: where the system does not tell, all that are resident."""
    return int(memory.rss - getattr(memory, "shared", 0))


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Random weights in the shards and under the names of the hub's; every layer has the same values."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    assert config.num_key_value_heads and config.head_dim  # of a config that transformers has completed
    keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (size, size), "self_attn.k_proj": (keys, size), "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, size), "mlp.gate_proj": (inner, size), "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner), "input_layernorm": (size,), "post_attention_layernorm": (size,),
    }  # fmt: skip
    layer = {name: _random(shape) for name, shape in shapes.items()}
    shards = [{"model.embed_tokens.weight": _random((vocabulary, size))}]
    shards += [
        {f"model.layers.{i}.{name}.weight": t for name, t in layer.items()} for i in range(config.num_hidden_layers)
    ]
    shards += [{"lm_head.weight": _random((vocabulary, size)), "model.norm.weight": _random((size,))}]
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        print(f"\rwriting {folder}: {number + 1} of {len(shards)} shards", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    config.save_pretrained(folder)  # last: a checkpoint that has one is whole


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    """Matrices as they are initialised, norms of ones."""
    return (
        torch.randn(shape, dtype=torch.bfloat16) * 0.02 if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
    )


if __name__ == "__main__":
    main()
