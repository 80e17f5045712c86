"""The example that knows ONNX Runtime alone gives popcompile's tokens, of either layout.

examples/clients/check.py does the same for clients that have to be installed first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from popcompile import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "clients" / "onnxruntime_loop.py"
PROMPTS = ["The capital of France is", "A B-tree is a self-balancing tree data structure. " * 24]
NEW_TOKENS = 24


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long"])
@pytest.mark.parametrize("layout", ["smollm2_package", pytest.param("unified_package", marks=pytest.mark.real)])
def test_onnxruntime_loop(layout: str, prompt: str, request: pytest.FixtureRequest) -> None:
    package: Path = request.getfixturevalue(layout)
    command = [sys.executable, str(EXAMPLE), str(package), prompt, str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ids = AutoTokenizer.from_pretrained(package)(prompt, return_tensors="pt")["input_ids"]
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    expected = load(package, prefill="pop").generate(ids, **length, do_sample=False)
    assert torch.tensor(json.loads(done.stdout)).equal(expected[0, ids.shape[1] :])
