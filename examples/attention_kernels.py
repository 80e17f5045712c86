"""Attention of a prompt alone, in the kernels of several runtimes: python examples/attention_kernels.py [--openvino]

One layer's causal attention over a prompt without a past, fp32, random queries, keys and values:

    onnxruntime             GroupQueryAttention, as models have it
    onnxruntime, blocks     the same over blocks of queries, as popcompile exports it (export/attention_blocks.py)
    torch                   scaled_dot_product_attention
    openvino                ScaledDotProductAttention, in an environment of its own (--openvino)

Prints ms, median of --repeats turns that alternate, and GFLOP/s of the triangle that a prompt needs, and compares what
they compute. `--save FILE` writes the model with the one operator: it is what an issue for ONNX Runtime would need.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from peer_models.builds import PEERS
from peer_models.environments import install
from tabulate import tabulate

from popcompile.export.cached_attention import attend_to_prompts
from popcompile.export.providers import PROVIDERS

#: heads, key/value heads and head size of a layer
SHAPES = {
    "smollm2-135m": (9, 3, 64),
    "qwen2.5-0.5b": (14, 2, 64),
    "llama-3.1-8b": (32, 8, 128),
    "gemma-3-4b": (8, 4, 256),
}
#: (queries, keys, values) -> (output, seconds)
Attention = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, float]]
#: where compare_peers.py installs its peers, unless it is told otherwise
_CACHE = Path(os.environ.get("POPCOMPILE_CACHE") or "~/.cache/popcompile").expanduser() / "peers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of layers, of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--lengths", default="1024,2048,4096", help="tokens of a prompt (default: 1024,2048,4096)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each (default: 2)")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO too, which is installed where it is not")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the last shape's model with one operator")
    options = parser.parse_args()
    if unknown := set(options.shapes.split(",")) - SHAPES.keys():
        parser.error(f"--shapes: {', '.join(sorted(unknown))} is unknown; choose from {', '.join(SHAPES)}")
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.shapes.split(","):
        heads, kv_heads, size = SHAPES[name]
        model = attention_model(heads, kv_heads, size)
        if options.save:
            onnx.save(model, options.save)
        for length in map(int, options.lengths.split(",")):
            subjects: dict[str, Attention] = {
                "onnxruntime": OnnxRuntime(model, options.threads),
                "onnxruntime, blocks": OnnxRuntime(in_blocks(model), options.threads),
                "torch": run_torch,
            }
            given = random_rows(heads, kv_heads, size, length)
            with ExitStack() as stack:
                if options.openvino:
                    subjects["openvino"] = stack.enter_context(OpenVINO(options.threads, given))
                times = measure(subjects, given, options.repeats)
            work = 2 * length**2 * heads * size / 1e9  # two products of half a square each
            for subject, seconds in times.items():
                median = statistics.median(seconds)
                ratio = f"{median / statistics.median(times['onnxruntime, blocks']):.2f}x"
                rows.append([name, f"{length:,}", subject, f"{median * 1e3:.1f}", ratio, f"{work / median:.0f}"])
    headers = ["shape", "tokens", "runtime", "ms", "/ blocks", "GFLOP/s"]
    print(f"onnxruntime {ort.__version__}, torch {torch.__version__}, {options.threads} threads, fp32")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "left", "right", "right", "right")))


def measure(subjects: dict[str, Attention], rows: list[np.ndarray], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one that is not counted and whose results have to agree."""
    results = {name: run(*rows)[0] for name, run in subjects.items()}
    expected = results["torch"]
    for name, result in results.items():
        error = np.abs(result - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"{name}: {error:.1e} of the largest output off"
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, run in subjects.items():
            times[name].append(run(*rows)[1])
    return times


def random_rows(heads: int, kv_heads: int, size: int, length: int) -> list[np.ndarray]:
    """Queries, keys and values of one prompt, [1, heads, length, size] each."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1, count, length, size), np.float32) for count in (heads, kv_heads, kv_heads)]


def attention_model(heads: int, kv_heads: int, size: int) -> onnx.ModelProto:
    """A graph with one GroupQueryAttention, and the inputs that a package's prefill has for it."""

    def value(name: str, kind: int, *sizes: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, sizes)

    floats, cache = TensorProto.FLOAT, ("batch", kv_heads, "past", size)
    inputs = [
        value("input_ids", TensorProto.INT64, "batch", "sequence"),
        value("attention_mask", TensorProto.INT64, "batch", "total"),
        value("query", floats, "batch", "sequence", heads * size),
        value("key", floats, "batch", "sequence", kv_heads * size),
        value("value", floats, "batch", "sequence", kv_heads * size),
        value("past_key", floats, *cache),
        value("past_value", floats, *cache),
        value("seqlens_k", TensorProto.INT32, "batch"),
        value("total_sequence_length", TensorProto.INT32),
    ]
    present = ("batch", kv_heads, "total", size)
    outputs = [
        value("output", floats, "batch", "sequence", heads * size),
        value("present_key", floats, *present),
        value("present_value", floats, *present),
    ]
    node = helper.make_node(
        "GroupQueryAttention", [i.name for i in inputs[2:]], [o.name for o in outputs], name="attention",
        domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, scale=size**-0.5,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph([node], "attention", inputs, outputs), opset_imports=opsets, ir_version=10
    )


def in_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, as it is exported for the CPU."""
    rewritten = ir.from_proto(model)
    assert attend_to_prompts(rewritten, PROVIDERS["cpu"].query_block)
    return ir.to_proto(rewritten)


class OnnxRuntime:
    """Attention to which queries, keys and values [1, heads, length, size] are given: [1, length, heads x size]."""

    def __init__(self, model: onnx.ModelProto, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.enable_mem_pattern = threads, False
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, float]:
        length, nothing = query.shape[2], np.empty((1, key.shape[1], 0, key.shape[3]), np.float32)
        feeds = {
            "input_ids": np.zeros((1, length), np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "past_key": nothing,
            "past_value": nothing,
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
        }
        feeds |= {
            name: _side_by_side(x) for name, x in zip(("query", "key", "value"), (query, key, value), strict=True)
        }
        wanted = {i.name for i in self._session.get_inputs()}
        feeds = {name: x for name, x in feeds.items() if name in wanted}
        began = time.perf_counter()
        output = self._session.run(["output"], feeds)[0]
        return output, time.perf_counter() - began


def run_torch(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, float]:
    q, k, v = map(torch.from_numpy, (query, key, value))
    began = time.perf_counter()
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return _side_by_side(output.numpy()), time.perf_counter() - began


def _side_by_side(x: np.ndarray) -> np.ndarray:
    """[1, length, heads x size] of [1, heads, length, size]."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(1, x.shape[2], -1)


class OpenVINO:
    """As OnnxRuntime, in a process of OpenVINO's own environment (peer_models/openvino_attention.py)."""

    def __init__(self, threads: int, given: list[np.ndarray]) -> None:
        """given: what it is called with."""
        (environment,) = next(peer for peer in PEERS if peer.name == "openvino").environments.items()
        installed = install(_CACHE / "environments" / environment[0], environment[1])
        script = Path(__file__).parent / "peer_models" / "openvino_attention.py"
        self._folder = tempfile.TemporaryDirectory()
        query, key, value = given
        np.savez(Path(self._folder.name) / "given.npz", query=query, key=key, value=value)
        command = [installed.python, str(script), self._folder.name, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> OpenVINO:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, float]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds = float(self._process.stdout.readline())
        return _side_by_side(np.load(Path(self._folder.name) / "output.npy")), seconds


if __name__ == "__main__":
    main()
