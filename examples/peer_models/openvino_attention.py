"""OpenVINO's attention for attention_kernels.py: python openvino_attention.py FOLDER THREADS, in its own environment.

Every line on stdin is a turn: the seconds that causal attention over FOLDER/given.npz takes, on a line of stdout. The
output is in FOLDER/output.npy.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import openvino
from openvino import opset13


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    request = None
    for _ in sys.stdin:
        if request is None:
            rows = np.load(folder / "given.npz")
            given = [rows[name] for name in ("query", "key", "value")]
            request = attention(given, threads)
        began = time.perf_counter()
        output = request.infer(given)[0]
        seconds = time.perf_counter() - began
        np.save(folder / "output.npy", output)
        print(seconds, flush=True)


def attention(rows: list[np.ndarray], threads: int) -> openvino.InferRequest:
    """Of queries [1, heads, length, size], keys and values [1, kv heads, length, size], whose heads are repeated."""
    inputs = [opset13.parameter(x.shape, np.float32) for x in rows]
    heads, (_, kv_heads, length, size) = rows[0].shape[1], rows[1].shape
    keys, values = (_repeated(x, [1, kv_heads, heads // kv_heads, length, size]) for x in inputs[1:])
    output = opset13.scaled_dot_product_attention(inputs[0], keys, values, causal=True)
    model = openvino.Model([output], inputs, "attention")
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", properties).create_infer_request()


def _repeated(x: openvino.Node, sizes: list[int]) -> openvino.Node:
    """Each head of x [1, kv heads, length, size] several times, sizes having how many behind the heads."""
    batch, kv_heads, count, length, size = sizes
    repeated = opset13.broadcast(opset13.unsqueeze(x, [2]), sizes, broadcast_spec="BIDIRECTIONAL")
    return opset13.reshape(repeated, [batch, kv_heads * count, length, size], False)


if __name__ == "__main__":
    main()
