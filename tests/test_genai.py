"""onnxruntime-genai loads the split package as it is and produces our runtime's tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from popcompile import load

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")

NEW_TOKENS = 32

#: run in a process of its own: genai brings its own onnxruntime
GENERATE = """
import json, sys
import numpy as np
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
for ids in json.loads(sys.argv[2]):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + int(sys.argv[3]), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(ids, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(t) for t in generator.get_sequence(0)][len(ids):]))
"""

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "A B-tree is a self-balancing tree data structure that maintains sorted data and allows searches, " * 8,
]


@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_same_greedy_tokens(model: str, request: pytest.FixtureRequest) -> None:
    package: Path = request.getfixturevalue(f"{model}_package")
    tokenizer = AutoTokenizer.from_pretrained(package)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ours = load(package, prefill="pop")
    stop = ours.generation_config.eos_token_id
    expected = []
    for ids in prompts:
        tokens = ours.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        new = tokens[0, len(ids) :].tolist()
        expected.append(new[: new.index(stop)] if stop in new else new)  # genai leaves the end token out
    arguments = [sys.executable, "-c", GENERATE, str(package), json.dumps(prompts), str(NEW_TOKENS)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected
