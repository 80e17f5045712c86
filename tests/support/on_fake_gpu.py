"""Run by test_cuda.py, in a process that finds a GPU: python on_fake_gpu.py place|count|answer|genai PACKAGE, or
open|run GRAPH.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.external_data_helper import uses_external_data

from popcompile.package.manifest import read_manifest
from popcompile.runtime.session import Runtime
from popcompile.runtime.weights import SharedWeights


def place(package: Path) -> None:
    """Open a session as `Runtime` does and let ONNX Runtime log; print how many weights the session is given."""
    manifest = read_manifest(package)
    file = package / manifest.graphs["prefill"]
    graph = onnx.load(file, load_external_data=False).graph
    options = ort.SessionOptions()
    options.log_severity_level = 0
    weights = SharedWeights(package / manifest.weights, "cuda")
    weights.add_to(options, graph)
    ort.InferenceSession(file, options, providers=["CUDAExecutionProvider"])
    print(sum(uses_external_data(tensor) for tensor in graph.initializer))


def open_graph(file: Path) -> None:
    """Open a session of a graph that finds its weights itself, and let ONNX Runtime log."""
    options = ort.SessionOptions()
    options.log_severity_level = 0
    ort.InferenceSession(file, options, providers=["CUDAExecutionProvider"])


def run_graph(file: Path) -> None:
    """Run a graph on zeros; print the shapes of what it returns, or that a kernel refuses its inputs."""
    session = ort.InferenceSession(file, providers=["CUDAExecutionProvider"])
    inputs = {value.name: np.zeros(value.shape, np.float32) for value in session.get_inputs()}
    try:
        print(json.dumps([list(value.shape) for value in session.run(None, inputs)]))
    except Exception:  # ONNX Runtime's have no common name but this, and it logs why
        print("refused")


def count(package: Path) -> None:
    """Encode prompts of [rows, tokens, past], each between lines on stderr that say so."""
    runtime = Runtime(package, provider="cuda")
    for rows, tokens, past in ((1, 12, 0), (3, 9, 0), (1, 5, 8)):
        cache = runtime.new_cache(rows)
        if past:
            runtime.feed([torch.ones(past, dtype=torch.int64)], cache, "prefill")
        print(f"run {rows} {tokens} {past}", file=sys.stderr, flush=True)
        runtime.feed([torch.ones(tokens, dtype=torch.int64)] * rows, cache, "prefill")
        print("end", file=sys.stderr, flush=True)


def answer(package: Path) -> None:
    """Generate after one prompt, after a second turn, of a batch and with full prefill; print the answers' shapes."""
    from popcompile import load  # which imports transformers: most of the time that another command takes

    model = load(package, provider="cuda", prefill="pop")
    few = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    prompt = torch.arange(1, 13)[None]
    first = model.generate(prompt, **few, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, prompt[:, :6]], dim=1)
    second = model.generate(turn, **few, past_key_values=first.past_key_values)
    batch = torch.arange(30).reshape(3, 10)
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    rows = model.generate(batch, attention_mask=mask, **few)
    shapes = [first.sequences.shape, second.shape, rows.shape]
    if "decode" in read_manifest(package).graphs:
        shapes += [model.generate(prompt, **few, prefill="full").shape, model(prompt).logits.shape]
    print(json.dumps([list(shape) for shape in shapes]))


def genai(package: Path) -> None:
    """Generate in onnxruntime-genai; print how many tokens there are."""
    import onnxruntime_genai as og

    model = og.Model(str(package))
    assert model.device_type == "CUDA"
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=24)
    generator = og.Generator(model, parameters)
    generator.append_tokens(list(range(1, 13)))
    for _ in range(3):
        generator.generate_next_token()
    print(len(generator.get_sequence(0)))


if __name__ == "__main__":
    commands = {"place": place, "count": count, "answer": answer, "genai": genai, "open": open_graph, "run": run_graph}
    commands[sys.argv[1]](Path(sys.argv[2]))
