"""Pruned against full at the shapes of models too large for this repository: python examples/bench_shapes.py WORK

For each shape writes a config to WORK, converts it with random weights (latency does not depend on them) with a third
and with half of the layers pruned, checks the CUDA provider's numbers against the CPU's on the model cut to a few
layers, and runs `popcompile bench`. Needs one NVIDIA GPU and, of memory on it, four times the weights at long prompts;
`--provider cpu --cut 2 --lengths 64 --batches 1` tries the script without. With `--image-tokens 256` a shape with a
vision tower has an image in every prompt, and with `--transformers` the weights are written as a checkpoint, which
transformers runs beside.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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
    "qwen3-vl-2b": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 262144, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
            "num_heads": 16, "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "gemma-3-4b-it": {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "image_token_index": 262144, "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "max_position_embeddings": 131072, "sliding_window": 1024, "query_pre_attn_scalar": 256,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "vision_use_head": False,
        },
    },
}  # fmt: skip
#: preprocessor_config.json of those with a vision tower
PROCESSORS = {
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2,
    },
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 896, "width": 896}},
}  # fmt: skip
#: those of text
_TEXT = [name for name, shape in SHAPES.items() if "vision_config" not in shape]
_CHECK = {"layers": 4, "tokens": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for configs and packages")
    parser.add_argument("--shapes", default=",".join(_TEXT), help=f"of {', '.join(SHAPES)}; default: %(default)s")
    parser.add_argument("--shares", default="1/3,1/2", help="of the layers, that are pruned (default 1/3,1/2)")
    parser.add_argument("--image-tokens", default="", help="of images in every prompt, for example 256,256")
    parser.add_argument("--dtype", default="fp16", help="default fp16")
    parser.add_argument("--provider", default="cuda", help="default cuda")
    parser.add_argument("--lengths", default="1024,4096,16384", help="of prompts, in tokens (default %(default)s)")
    parser.add_argument("--batches", default="1,8", help="rows of a prompt (default 1,8)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="after every prompt (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    parser.add_argument("--cut", type=int, help="cut the models to so many layers")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers, too")
    options = parser.parse_args()
    lengths, batches, images = (
        [int(n) for n in text.split(",") if n] for text in (options.lengths, options.batches, options.image_tokens)
    )
    for name in options.shapes.split(","):
        checked = options.cut or _CHECK["layers"]
        if options.provider != "cpu":
            few, _ = package(options, name, checked, "1/2")
            print(f"{name} cut to {checked} layers: {agreement(few, options.provider)}", flush=True)
        for share in options.shares.split(","):
            folder, checkpoint = package(options, name, options.cut, share)
            for batch in batches:
                try:
                    result = bench(
                        folder, [checkpoint] if options.transformers else [], lengths=lengths, batch=batch,
                        decode_tokens=options.decode_tokens, repeats=options.repeats, provider=options.provider,
                        image_tokens=images,
                    )  # fmt: skip
                except PopcompileError as error:  # 16,384 tokens of 8 rows do not fit everywhere
                    print(f"{name}, {share} pruned, batch {batch}: {error}", file=sys.stderr)
                    continue
                print(f"{name}, {share} pruned, batch {batch}\n\n{bench_text(result)}\n", flush=True)


def package(options: argparse.Namespace, name: str, cut: int | None, share: str) -> tuple[Path, Path]:
    """The package of a shape with random weights, cut to so many layers, made unless it is there, and what of."""
    shape = SHAPES[name]
    decoder = shape.get("text_config", shape)
    layers = cut or decoder["num_hidden_layers"]
    stem = f"{name}-{layers}-{share.replace('/', '_')}-{options.dtype}-{options.provider}"
    folder, config = options.work / stem, options.work / f"{stem}.config"
    if not folder.is_dir():
        config.mkdir(parents=True, exist_ok=True)
        few = {"num_hidden_layers": layers}
        whole = shape | ({"text_config": decoder | few} if "text_config" in shape else few)
        (config / "config.json").write_text(json.dumps(whole))
        started = time.perf_counter()
        if options.transformers:
            save_random(config)
        convert(
            config, folder, prune=share, kv_projection="layer", dtype=options.dtype, provider=options.provider,
            random_weights=not options.transformers,
        )  # fmt: skip
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{stem}: converted in {time.perf_counter() - started:.0f} s, {size / 1e9:.1f} GB", flush=True)
    return folder, config


def save_random(folder: Path) -> None:
    """The weights that transformers begins with, beside their config, and what a checkpoint with images has as well."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    if config.model_type in PROCESSORS:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[config.model_type]))


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
