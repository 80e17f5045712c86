"""Memory and time of a vision tower of Qwen3-VL-2B's shape, in ONNX Runtime and in PyTorch: vision_memory.py WORK

Writes the tower with random weights to WORK, as ONNX and as safetensors (3.3 GB), then runs one image of 64 x 64
patches through both, each in a process of its own, and compares what they hold at most and what they compute. `--side`
and `--layers` make it smaller. Linux only, for the sake of its peaks of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from popcompile.bench.memory import peak_bytes

#: Qwen3-VL-2B-Instruct's vision_config
VISION: dict[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2048, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
SUBJECTS = ("onnxruntime", "onnxruntime unpacked", "pytorch sdpa", "pytorch eager")
#: in WORK
GRAPH, TENSORS, PIXELS, GRID = "vision.onnx", "vision.safetensors", "pixel_values.npy", "image_grid_thw.npy"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for the tower's files")
    parser.add_argument("--side", type=int, default=64, help="patches along each side of the image (default: 64)")
    parser.add_argument("--layers", type=int, default=24, help="blocks of the tower (default: 24)")
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        print(json.dumps(run(options.work, options.subject)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(options.work)]
    make = [sys.executable, "-c", f"import vision_memory as v; v.make(v.Path({str(options.work)!r}), {options.layers})"]
    subprocess.run(make, check=True, cwd=Path(__file__).parent)
    features = 3 * VISION["temporal_patch_size"] * VISION["patch_size"] ** 2
    pixels = np.random.default_rng(0).standard_normal((options.side**2, features), dtype=np.float32)
    np.save(options.work / PIXELS, pixels)
    np.save(options.work / GRID, np.array([[1, options.side, options.side]]))
    results = {}
    for subject in SUBJECTS:
        done = subprocess.run([*command, "--subject", subject], check=True, stdout=subprocess.PIPE, text=True)
        results[subject] = json.loads(done.stdout.splitlines()[-1])
        print(f"{subject}: {results[subject]}", flush=True)
    expected = np.load(result_of(options.work, "pytorch sdpa"))
    for subject in SUBJECTS[:2]:
        times = results[subject]["image_mib"] / results["pytorch sdpa"]["image_mib"]
        error = np.abs(np.load(result_of(options.work, subject)) - expected).max() / np.abs(expected).max()
        print(f"{subject}: {times:.2f} times PyTorch's memory with sdpa; features differ by {error:.1e} of the largest")


def make(work: Path, layers: int) -> None:
    """Write the tower with random weights: GRAPH, its data, and TENSORS under transformers' names."""
    import onnx_ir as ir
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig

    from popcompile.export.onnx_graph import images_to_onnx
    from popcompile.export.weights import write_weights
    from popcompile.frontend.source import random_tensor
    from popcompile.passes import PassManager, image_lowering
    from popcompile.vision.tracing import build_model, trace_images

    vision = VISION | {"depth": layers, "deepstack_visual_indexes": [i for i in (5, 11, 17) if i < layers]}
    text = {"hidden_size": 2048, "num_hidden_layers": 1, "vocab_size": 1000}
    model = build_model(Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=990, video_token_id=991))
    started = time.perf_counter()
    program = trace_images(model)
    del program.graphs["embedding"]
    PassManager(image_lowering()).run(program)
    models = images_to_onnx(program, "cpu")
    print(f"traced, lowered and written down in {time.perf_counter() - started:.1f} s", flush=True)
    prefix = "model.visual."
    tensors = {
        name.removeprefix(prefix): torch.ones(parameter.shape)
        if "norm" in name and name.endswith("weight")
        else random_tensor(name, tuple(parameter.shape), torch.float32)
        for name, parameter in model.named_parameters()
        if name.startswith(prefix)
    }
    write_weights(work / f"{GRAPH}.data", models, program, lambda name: tensors[name.removeprefix(prefix)])
    ir.save(models["vision"], work / GRAPH)
    save_file(tensors, work / TENSORS, {"config": json.dumps(vision)})


def run(work: Path, subject: str) -> dict[str, Any]:
    """One image through one of SUBJECTS: seconds, and MiB that this process holds, resident and with pages of files.

    libraries_mib: before the weights. loading_mib: the most until they are there. image_mib: the most while the image
    is computed, with the weights.
    """
    pixels, grid = np.load(work / PIXELS), np.load(work / GRID)
    load = onnxruntime_tower if subject.startswith("onnxruntime") else pytorch_tower
    call, before = load(work, subject)
    loading = peak_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    started = time.perf_counter()
    features = call(pixels, grid)
    seconds = time.perf_counter() - started
    np.save(result_of(work, subject), features)
    sizes = {"libraries_mib": before, "loading_mib": loading, "image_mib": peak_bytes()}
    return {"seconds": round(seconds, 1)} | {name: (size or 0) >> 20 for name, size in sizes.items()}


def result_of(work: Path, subject: str) -> Path:
    return work / f"{subject.replace(' ', '-')}.npy"


def onnxruntime_tower(work: Path, subject: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    options.enable_mem_pattern = False
    if subject.endswith("unpacked"):
        options.add_session_config_entry("session.disable_prepacking", "1")
    before = peak_bytes()
    session = ort.InferenceSession(work / GRAPH, options, providers=["CPUExecutionProvider"])
    return lambda pixels, grid: session.run(None, {"pixel_values": pixels, "image_grid_thw": grid})[0], before


def pytorch_tower(work: Path, subject: str) -> Any:
    import torch
    from safetensors import safe_open
    from transformers import AutoModel
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    before = peak_bytes()
    with safe_open(work / TENSORS, "pt") as file:
        config = Qwen3VLVisionConfig(**json.loads(file.metadata()["config"]))
        tower = AutoModel.from_config(config, attn_implementation=subject.split()[1]).eval()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a file, not a dictionary
    tower.load_state_dict(tensors, assign=True)  # pages of the file, of which there is no copy

    @torch.no_grad()
    def call(pixels: Any, grid: Any) -> Any:
        out = tower(torch.from_numpy(pixels), grid_thw=torch.from_numpy(grid))
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=1).numpy()

    return call, before


if __name__ == "__main__":
    main()
