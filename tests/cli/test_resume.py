"""A conversion that was stopped goes on from the steps that it finished, if it is asked for the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cli, save_model
from safetensors.torch import load_file, save_file

from popcompile.package.manifest import REPORT, read_manifest
from popcompile.pruning import held_out, plan, search, text

OPTIONS = ["--prune", "2", "--calibration-texts", "8", "--refinement-steps", "2", "--resume"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", num_hidden_layers=4, max_position_embeddings=96)


def counted(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> list[str]:
    """Has an entry for each call."""
    original: Callable[..., Any] = getattr(place, name)
    calls: list[str] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, call)
    return calls


def stop(monkeypatch: pytest.MonkeyPatch, cli: Cli, model: Path, out: Path) -> None:
    """Convert until all is chosen and before the result is measured."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(plan, "_quality", fail)
        assert cli.run("convert", model, out, *OPTIONS)[0] != 0


def choice_of(package: Path) -> tuple[list[int], Any]:
    report = json.loads((package / REPORT).read_bytes())
    return read_manifest(package).pruned, (report["choice"], report["quality"])


def test_what_is_finished_is_not_computed_again(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the last measurement, the package is what it is without a stop."""
    assert cli.run("convert", model, tmp_path / "whole", *OPTIONS)[0] == 0
    steps = tmp_path / "out.steps"
    steps.mkdir()  # as of a conversion that was killed before its first step was done
    stop(monkeypatch, cli, model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (steps / "text.safetensors").is_file()
    with monkeypatch.context() as patch:
        calls = [
            counted(patch, text, "sample_texts"),
            counted(patch, search, "refine"),
            counted(patch, search, "calibrate"),
        ]
        measured = counted(patch, held_out.HeldOutKinds, "measure")
        assert cli.run("convert", model, tmp_path / "out", *OPTIONS)[0] == 0
    assert calls == [[], [], []] and len(measured) == 2, "only what is reported at the end"
    assert choice_of(tmp_path / "out") == choice_of(tmp_path / "whole")
    weights = [load_weights(tmp_path / name) for name in ("out", "whole")]
    assert weights[0] == weights[1]
    assert not steps.exists() and not (tmp_path / "whole.steps").exists()


def load_weights(package: Path) -> bytes:
    return next(package.glob("*.data")).read_bytes()


def test_what_is_damaged_is_computed_again(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(monkeypatch, cli, model, tmp_path / "out")
    steps = tmp_path / "out.steps"
    for file in steps.iterdir():
        if file.name != "steps.json":
            file.write_bytes(file.read_bytes()[:20])
    assert cli.run("convert", model, tmp_path / "out", *OPTIONS)[0] == 0
    assert not steps.exists()


def test_another_conversion(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch, cli, model, tmp_path / "out")
    line = cli.refuses("convert", model, tmp_path / "out", *OPTIONS, "--seed", "1", "--window", "2")
    assert "out.steps is of a conversion with another --seed, --window; remove it to begin again" in line
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = cli.refuses("convert", model, tmp_path / "out", *OPTIONS)
    assert "is of a conversion with another MODEL; " in line
    (tmp_path / "out.steps" / "steps.json").write_text("[]")
    line = cli.refuses("convert", model, tmp_path / "out", *OPTIONS)
    assert "holds no steps of a conversion; move it away, or leave --resume out" in line
    assert cli.run("convert", model, tmp_path / "out", *OPTIONS[:-1])[0] == 0, "it is not looked at without --resume"


def test_what_is_not_ours_stays(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.steps").mkdir()
    (tmp_path / "out.steps" / "notes.txt").touch()
    assert "holds no steps" in cli.refuses("convert", model, tmp_path / "out", *OPTIONS)
