"""EleutherAI's lm-evaluation-harness on a package, with task files and data of our own: no hub is asked."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cli
from reference import pop_prefill
from transformers import AutoModelForCausalLM, AutoTokenizer

from popcompile.cli import main
from popcompile.errors import PopcompileError
from popcompile.evaluation.harness import _fit, _harness_model
from popcompile.report.tasks import tasks_text
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.session import Runtime

try:
    importlib.import_module("lm_eval")

    MISSING = False
except ImportError:
    MISSING = True

harness = pytest.mark.skipif(MISSING, reason='lm-eval is not installed: pip install "popcompile[eval]"')

QUESTIONS = [
    ("The capital of France is the city of", ["Paris", "London, on the Thames", "Berlin"]),
    ("When water gets very cold it freezes and turns into", ["ice", "a very big dog", "fire"]),
    ("The opposite of hot is", ["cold", "seven", "the green house on the hill"]),
    ("A week has seven days: Monday, Tuesday, Wednesday, Thursday,", ["Friday, Saturday", "March, April", "red"]),
]
COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = (
    COMMON
    + """\
task: local_choice
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""
)
ANSWER = (
    COMMON
    + """\
task: local_answer
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""
)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks over one data file; where the data sets library keeps its copy is temporary too."""
    data = tmp_path / "data.jsonl"
    lines = [{"question": question, "choices": choices, "answer": "?"} for question, choices in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    if not MISSING:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@harness
def test_likelihoods_are_those_of_each_prefill(smollm2_package: Path, smollm2_checkpoint: Path) -> None:
    """Against transformers: the context through full or pruned layers, the answer by the full model."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32).eval()
    runtime = Runtime(smollm2_package)
    pruned, window = runtime.manifest.pruned, runtime.manifest.window
    pairs = [
        (tokenizer.encode(question), tokenizer.encode(f" {choice}"))
        for question, choices in QUESTIONS[-1:]  # longer than the window
        for choice in choices
    ]
    found = {}
    for prefill, layers in (("full", []), ("pop", pruned)):
        lm = _harness_model(PopForCausalLM(runtime, prefill), tokenizer)
        found[prefill] = lm._loglikelihood_tokens([(None, *pair) for pair in pairs])
        for (context, answer), (likelihood, is_greedy) in zip(pairs, found[prefill], strict=True):
            logits, cache = pop_prefill(model, torch.tensor([context]), layers, window=window)
            if len(answer) > 1:
                with torch.no_grad():
                    rest = model(torch.tensor([answer[:-1]]), past_key_values=cache, use_cache=True).logits
                logits = torch.cat((logits, rest), dim=1)
            wanted = torch.log_softmax(logits[0], -1).gather(1, torch.tensor(answer)[:, None]).sum()
            assert likelihood == pytest.approx(float(wanted), abs=1e-2)  # 1e-3 a logit, over up to five tokens
            assert is_greedy == bool((logits[0].argmax(-1) == torch.tensor(answer)).all())
    differences = [abs(one[0] - other[0]) for one, other in zip(found["full"], found["pop"], strict=True)]
    assert min(differences) > 2e-2  # requests do use the pruned prefill


def test_a_context_longer_than_the_model_loses_its_beginning() -> None:
    """As in HFLM: of context and answer all but the last token is fed, at most the model's context in all."""
    context, answer = list(range(100)), [7, 8, 9]
    assert _fit(context, answer, 102) == (context, answer)
    assert _fit(context, answer, 101) == (context[1:], answer)
    assert _fit(context, answer, 10) == (context[-8:], answer)
    assert _fit(context, answer, 3) == (context[-1:], answer)
    with pytest.raises(PopcompileError, match="an answer has 3 tokens"):
        _fit(context, answer, 2)


@harness
def test_tasks_on_the_command_line(smollm2_package: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--tasks", "local_choice,local_answer", "--include-path", str(tasks), "--limit", "2"]
    assert main(["evaluate", str(smollm2_package), *names, "--json"]) == 0
    out, err = capsys.readouterr()
    result: dict[str, Any] = json.loads(out)
    assert err == "" and set(result["tasks"]) == {"full", "pop"} and result["limit"] == 2
    for metrics in result["tasks"].values():
        assert metrics["local_choice"]["acc,none"] == 1  # Paris and ice
        assert metrics["local_answer"]["exact_match,none"] == 0  # nobody answers "?"
    rows = [line.split() for line in tasks_text(result).splitlines()[-2:]]
    assert rows[0] == ["local_choice", "acc", "1.0000", "±", "0.0000", "1.0000", "±", "0.0000"]
    assert rows[1][:2] == ["local_answer", "exact_match"]


@harness
def test_tasks_that_cannot_be_run(smollm2_package: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(capsys, tasks)
    assert "no such task" in cli.refuses("evaluate", smollm2_package, "--tasks", "local_choice,no_such_task")
    assert "no task" in cli.refuses("evaluate", smollm2_package, "--tasks", " , ")
    assert "no such folder" in cli.refuses(
        "evaluate", smollm2_package, "--tasks", "local_choice", "--include-path", tasks / "missing"
    )
    (tasks.parent / "data.jsonl").unlink()
    line = cli.refuses("evaluate", smollm2_package, "--tasks", "local_choice", "--include-path", tasks)
    assert "the harness cannot run it" in line and "data.jsonl" in line


def test_without_the_harness(
    smollm2_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = Cli(capsys, tmp_path).refuses("evaluate", smollm2_package, "--tasks", "hellaswag")
    assert "pip install lm-eval" in line


@harness
def test_generation_uses_each_prefill(smollm2_package: Path) -> None:
    from lm_eval.api.instance import Instance

    runtime, tokenizer = Runtime(smollm2_package), AutoTokenizer.from_pretrained(smollm2_package)
    prompt = "Here is a list of the planets of the solar system, from the sun outwards:"
    arguments = (prompt, {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False})
    for prefill in ("full", "pop"):
        model = PopForCausalLM(runtime, prefill)
        lm = _harness_model(model, tokenizer)
        request = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert lm.generate_until([request]) == [tokenizer.decode(wanted, skip_special_tokens=True)]
