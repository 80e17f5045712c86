"""Greedy tokens with ONNX Runtime alone: python onnxruntime_loop.py PACKAGE "PROMPT" [NEW_TOKENS]

Needs onnxruntime, numpy and tokenizers; nothing of popcompile. Takes either layout: prompts and tokens go through the
pruned graph, which for one token is the whole model. Past and present are one buffer with room for all tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

package, prompt, new_tokens = Path(sys.argv[1]), sys.argv[2], int((sys.argv[3:] or ["32"])[0])
manifest = json.loads((package / "popcompile.json").read_text())
options = ort.SessionOptions()
options.enable_mem_pattern = False  # of use where shapes come again, and every token has longer ones
graph = package / manifest["graphs"]["prefill"]
session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))

ids = tokenizer.encode(prompt).ids
room = (1, manifest["num_kv_heads"], len(ids) + new_tokens, manifest["head_size"])
binding = session.io_binding()
caches = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(room, np.float32)) for name in manifest["inputs"][2:]}
for name, cache in caches.items():  # `caches` keeps the memory, the binding does not
    binding.bind_ortvalue_input(name, cache)
    binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)

tokens, new = list(ids), ids
while len(tokens) < len(ids) + new_tokens:
    binding.bind_cpu_input("input_ids", np.array([new]))
    binding.bind_cpu_input("attention_mask", np.ones((1, len(tokens)), np.int64))
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    logits = binding.get_outputs()[-1].numpy()  # [1, 1, vocabulary]
    new = [int(logits[0, -1].argmax())]
    tokens += new
print(json.dumps(tokens[len(ids) :]))
