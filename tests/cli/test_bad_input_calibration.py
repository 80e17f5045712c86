"""Bad input to calibration and to the choice of layers: one line with cause and fix, status 2, nothing on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from bad_input import Cli, save_model
from safetensors.torch import load_file, save_file
from words import save_words

from popcompile.cli import main
from popcompile.package.manifest import REPORT


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("model") / "model", num_hidden_layers=4, max_position_embeddings=96, vocab_size=128
    )


FILES = [
    ("missing.txt", None, "no such file"),
    ("empty.txt", b"", "has no text"),
    ("short.txt", b"w1 w2 w3 " * 20, "and one window needs 96"),
    ("pieces.txt", b"w1 w2 w3 " * 100, "too short, it has 3 pieces of 96 tokens and needs 8; give more text"),
    ("latin1.txt", b"caf\xe9", "is not UTF-8"),
    ("lines.jsonl", b"w1 w2\n", "line 1: is not JSON"),
    ("fields.jsonl", b'{"text": "w1"}\n{"label": 1}\n', "line 2: has no text"),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[name for name, *_ in FILES])
def test_calibration_files(
    name: str, content: bytes | None, words: str, cli: Cli, pristine: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    line = cli.refuses("convert", pristine, tmp_path / "out", "--prune", "2", "--calibration", path)
    assert words in line and name in line


OPTIONS = [
    (["--max-kl", "-1"], "--max-kl: -1 is not a number of at least 0, for example 0.1"),
    (["--max-kl", "nan"], "--max-kl: nan is not a number"),
    (["--max-kl", "x"], "--max-kl: x is not a number"),
    (["--max-ppl-ratio", "0.9"], "--max-ppl-ratio: 0.9 is not a number of at least 1, for example 1.05"),
    (["--max-ppl-ratio", "inf"], "inf is not a number of at least 1"),
    (["--prune", "2", "--max-kl", "0.1"], "are budgets of --prune auto"),
    (["--layers", "2-3", "--max-ppl-ratio", "1.1"], "are budgets of --prune auto"),
    (["--calibration-texts", "7"], "--calibration-texts 7: too few to fit anything; give at least 8"),
    (["--refinement-steps", "-1"], "--refinement-steps: -1 is not a number of at least 0"),
    (["--calibration-texts", "0"], "0 is not a number of at least 1"),
    (["--kv-projection", "best"], "--kv-projection best: unknown; choose one of calibrated, layer"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[" ".join(o) for o, _ in OPTIONS])
def test_options(options: list[str], words: str, cli: Cli, pristine: Path, tmp_path: Path) -> None:
    assert words in cli.refuses("convert", pristine, tmp_path / "out", *options)


def test_no_tokenizer_for_a_file(cli: Cli, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=96, vocab_size=128)
    for path in (*model.glob("tokenizer*"), *model.glob("special*"), *model.glob("chat*")):
        path.unlink()
    text = save_words(tmp_path / "words.txt", 0)
    line = cli.refuses("convert", model, tmp_path / "out", "--prune", "2", "--calibration", text)
    assert "the model has no tokenizer; give --calibration self" in line


def test_a_context_too_short_to_calibrate(cli: Cli, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=32)
    line = cli.refuses("convert", model, tmp_path / "out")
    assert "the model's context of 32 tokens is too short to calibrate on (64 are needed)" in line


def change(model: Path, name: str, factor: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_damaged_weights_name_the_layer(cli: Cli, tmp_path: Path) -> None:
    model = save_model(tmp_path / "nan", num_hidden_layers=3, max_position_embeddings=96, vocab_size=128)
    change(model, "model.layers.1.mlp.up_proj.weight", float("nan"))
    line = cli.refuses("convert", model, tmp_path / "out", "--prune", "2")
    assert "tensor model.layers.1.mlp.up_proj.weight holds NaN or infinity; fix the checkpoint" in line


def test_overflow_names_the_layer(cli: Cli, tmp_path: Path) -> None:
    """Finite weights whose products are not."""
    model = save_model(tmp_path / "huge", num_hidden_layers=3, max_position_embeddings=96, vocab_size=128)
    for kind in ("gate", "up", "down"):
        change(model, f"model.layers.1.mlp.{kind}_proj.weight", 1e20)
    text = save_words(tmp_path / "words.txt", 0, 1000)
    line = cli.refuses("convert", model, tmp_path / "out", "--layers", "1-2", "--calibration", text)
    assert "layer 1 computes NaN or infinity on the calibration text" in line


def test_inspect_without_quality(cli: Cli, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(pristine), str(out), "--prune", "2", "--kv-projection", "layer"]) == 0
    assert '"quality"' not in (out / REPORT).read_text()
    assert main(["inspect", str(out)]) == 0
    assert "not measured" in capsys.readouterr().out


def test_too_little_memory(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=96, vocab_size=128)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    line = cli.refuses("convert", model, tmp_path / "out", "--prune", "2")
    assert "0.0 GB are free; give --kv-projection layer with --prune 1/3 or --layers" in line
    assert main(["convert", str(model), str(tmp_path / "out"), "--prune", "2", "--kv-projection", "layer"]) == 0
