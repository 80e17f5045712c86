"""Pruned against full at the shapes of models too large for this repository: python examples/bench_shapes.py WORK

For each shape writes a config to WORK, converts it with random weights (latency does not depend on them) with a third
and with half of the layers pruned, checks the CUDA provider's numbers against the CPU's on the model cut to a few
layers, and runs `popcompile bench`. Needs one NVIDIA GPU and, of memory on it, four times the weights at long prompts;
`--provider cpu --cut 2 --lengths 64 --batches 1` tries the script without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from popcompile.bench.measure import bench
from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.report.bench import bench_text
from popcompile.runtime.session import Runtime

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "sliding_window": 1024, "query_pre_attn_scalar": 256,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip
_CHECK = {"layers": 4, "tokens": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for configs and packages")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--dtype", default="fp16", help="default fp16")
    parser.add_argument("--provider", default="cuda", help="default cuda")
    parser.add_argument("--lengths", default="1024,4096,16384", help="of prompts, in tokens (default %(default)s)")
    parser.add_argument("--batches", default="1,8", help="rows of a prompt (default 1,8)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="after every prompt (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    parser.add_argument("--cut", type=int, help="cut the models to so many layers")
    options = parser.parse_args()
    lengths, batches = ([int(n) for n in text.split(",")] for text in (options.lengths, options.batches))
    for name in options.shapes.split(","):
        checked = options.cut or _CHECK["layers"]
        few = package(options, name, checked, "1/2")
        if options.provider != "cpu":
            print(f"{name} cut to {checked} layers: {agreement(few, options.provider)}", flush=True)
        for share in ("1/3", "1/2"):
            folder = package(options, name, options.cut or SHAPES[name]["num_hidden_layers"], share)
            for batch in batches:
                try:
                    result = bench(
                        folder, lengths=lengths, batch=batch, decode_tokens=options.decode_tokens,
                        repeats=options.repeats, provider=options.provider,
                    )  # fmt: skip
                except PopcompileError as error:  # 16,384 tokens of 8 rows do not fit everywhere
                    print(f"{name}, {share} pruned, batch {batch}: {error}", file=sys.stderr)
                    continue
                print(f"{name}, {share} pruned, batch {batch}\n\n{bench_text(result)}\n", flush=True)


def package(options: argparse.Namespace, name: str, layers: int, share: str) -> Path:
    """The package of a shape with random weights, made unless it is there."""
    stem = f"{name}-{layers}-{share.replace('/', '_')}-{options.dtype}-{options.provider}"
    folder, config = options.work / stem, options.work / f"{stem}.config"
    if not folder.is_dir():
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.json").write_text(json.dumps(SHAPES[name] | {"num_hidden_layers": layers}))
        convert(config, folder, prune=share, dtype=options.dtype, provider=options.provider, random_weights=True)
    return folder


def agreement(folder: Path, provider: str) -> str:
    """Logits and cache of one prompt on the provider against those on the CPU."""
    found = []
    for name in ("cpu", provider):
        runtime = Runtime(folder, provider=name)
        ids = torch.randint(
            runtime.manifest.vocab_size, (_CHECK["tokens"],), generator=torch.Generator().manual_seed(0)
        )
        cache = runtime.new_cache(1)
        found.append([runtime.feed([ids], cache, "prefill"), *cache.tensors()])
    worst = max(float((a.float() - b.float()).abs().max() / a.float().abs().max()) for a, b in zip(*found, strict=True))
    return f"{provider} differs from the CPU by at most {worst:.1e} of the largest value"


if __name__ == "__main__":
    main()
