"""The commands on real packages: what a user types and what they see."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from popcompile.cli import main

TIMING = r"\d+ prompt tokens, (pop|full) prefill: time to first token \d+ ms"


def test_run_streams_an_answer_and_prints_its_timing(smollm2_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(smollm2_package), "--prompt", "What is the capital of France?", "--max-new-tokens", "24"]
    answers = {}
    for how in ("full", "pop"):
        assert main([*arguments, "--prefill", how]) == 0
        out, err = capsys.readouterr()
        assert re.search(TIMING, err) and f"{how} prefill" in err and "tokens/s" in err
        answers[how] = out
    assert "Paris" in answers["full"]
    assert answers["pop"].strip()


def test_run_reads_a_file_and_samples_repeatably(
    smollm2_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time", encoding="utf-8")
    arguments = ["run", str(smollm2_package), "--prompt-file", str(prompt), "--raw", "--max-new-tokens", "8"]
    answers = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--sample", "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_chat_takes_turns(
    smollm2_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nWhat is two plus two?\n"))
    assert main(["run", str(smollm2_package), "--chat", "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(TIMING, err)) == 2
    assert len(out.splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "  "], "prompt is empty"),
        (["--prompt", "hi", "--max-new-tokens", "9000"], "context"),
        (["--prompt", "hi", "--prefill", "fast"], "auto, pop, full"),
        (["--prompt", "hi", "--provider", "tpu"], "cpu"),
        (["--prompt", "hi", "--provider", "cuda"], "provider cuda"),
        (["--prompt-file", "no-such-file.txt"], "no-such-file.txt"),
        (["--prompt", "hi", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_run_refuses_in_one_line(
    arguments: list[str], words: str, smollm2_package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["run", str(smollm2_package), *arguments])
    except SystemExit as stop:  # argparse's own
        status = int(stop.code or 0)
    out, err = capfd.readouterr()
    assert status == 2
    assert out == "" and err.count("\n") == 1 and words in err


def test_a_prompt_file_that_is_not_text(
    smollm2_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert main(["run", str(smollm2_package), "--prompt-file", str(path)]) == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["smollm2", pytest.param("gemma", marks=pytest.mark.real)])
def test_verify(model: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    package = request.getfixturevalue(f"{model}_package")
    assert main(["verify", str(package)]) == 0
    assert capsys.readouterr().out.count("ok  ") == 4
    if model == "smollm2":
        assert main(["verify", str(package), "--json"]) == 0
        checks = json.loads(capsys.readouterr().out)["checks"]
        assert [check["check"] for check in checks] == ["files", "graphs", "configs", "numbers"]


def test_inspect(smollm2_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(smollm2_package)]) == 0
    text = capsys.readouterr().out
    assert "10 of 30 layers: 20-29" in text
    assert "InsertBoundaryRecompute" in text and "last 8 tokens" in text
    assert main(["inspect", str(smollm2_package), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    report = document["report"]
    assert document["manifest"]["pruned"] == list(range(20, 30))
    assert report["flops"]["full_prefill_one_logit"] / report["flops"]["pop_prefill"] > 1.4
    assert [row["layer"] for row in report["layers"] if row["pruned"]] == list(range(20, 30))
    first, last = report["passes"][0], report["passes"][-1]
    assert first["nodes_before"]["prefill"] > last["nodes_after"]["prefill"]
    assert main(["inspect", str(smollm2_package), "--pass", "PruneLMHead"]) == 0
    code = capsys.readouterr().out
    assert "# prefill before PruneLMHead" in code and "# prefill after PruneLMHead" in code
    assert "f32[batch, sequence, 49152] lm_head" in code.replace("  # ", " # ")
    assert "f32[batch, 1, 49152] lm_head" in code
