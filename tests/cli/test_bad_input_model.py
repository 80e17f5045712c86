"""Bad models: one line on stderr that says what is wrong and how to fix it, exit status 2, nothing left on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bad_input import TENSORS, UP, Cli, assert_one_line, change_tensor, popcompile


def test_unknown_model(cli: Cli, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = popcompile("convert", "nobody/no-such-model", tmp_path / "out", env=environment)
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert "nobody/no-such-model: no such folder or file, and not in the local Hugging Face cache" in done.stderr
    assert "give a local folder, a .gguf file, or a cached hub id" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert "no config.json; give the folder of a" in cli.refuses("convert", tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("kind", ["t5", "mamba", "vit", "bert", "rwkv"])
def test_not_a_decoder(kind: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"]}))
    for options in ([], ["--random-weights"]):
        line = cli.refuses("convert", tmp_path, tmp_path / "out", *options)
        assert f"(model type {kind})" in line and "popcompile supports decoder-only causal LMs" in line


def test_broken_gguf(cli: Cli, tmp_path: Path) -> None:
    for content, words in {
        b"": "is not a GGUF file; give a .gguf file or a model's folder",
        b"PK\3\4" * 9: "is not a GGUF file",
        b"GGUF\3\0\0\0": "the GGUF header is truncated or corrupt; download it again",
        b"GGUF" + b"\xff" * 500: "download it again",
    }.items():
        (tmp_path / "x.gguf").write_bytes(content)
        assert words in cli.refuses("convert", tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(case: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    change, options, words = TENSORS[case]
    change_tensor(model, UP, change)
    assert words in cli.refuses("convert", model, tmp_path / "out", "--prune", "1", *options)
