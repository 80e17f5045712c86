"""Every type of transformers' causal LM mapping works, or is refused in one line that says what is not supported.

    pytest tests/test_sweep.py               each type's default config: accepted, or refused as sweep/README.md says
    pytest -m sweep tests/test_sweep.py      tiny models of all types, variants of their configs too (1 to 2 hours)
    SWEEP=FILE pytest -m sweep ...           the same, resumed: results go to FILE, and what it holds is not run again
    python tests/sweep/table.py FILE         print sweep/README.md from it

Each case converts a tiny model and compares its logits with those of transformers' own module: a whole prompt, a second
one after it, a batch that is padded on the left, and a pruned prefill.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sweep.configs import cases, default_config, model_types, variants
from sweep.table import recorded
from sweep.worker import Case, Result, Worker

from popcompile.errors import PopcompileError
from popcompile.frontend.decoders import require_decoder

#: seconds for one case, which takes about 10 on an idle core
LIMIT = 300


def assert_says(line: str, model_type: str) -> None:
    """One line, short, about this model, and about nothing inside of popcompile, torch or the trace."""
    assert line == " ".join(line.split()), line
    assert len(line) < 300, line
    assert re.split("[_-]", model_type)[0] in line.lower(), line
    assert not any(word in line for word in ("Error", "lifted_tensor", "Traceback", "0x", "aten.", "s72")), line


def test_every_type_is_decided() -> None:
    """By its class's own defaults, a published model's: the table says the same of the types that it knows."""
    known = recorded()
    for model_type in model_types():
        line = ""
        try:
            require_decoder("MODEL", default_config(model_type))
        except PopcompileError as error:
            line = str(error)
            assert_says(line, model_type)
        if model_type in known:
            by_config = known[model_type].startswith("refused by its config")
            assert by_config == bool(line), (model_type, known[model_type], line)


@pytest.mark.parametrize(
    ("model_type", "variant"), [("laguna", ""), ("modernbert-decoder", ""), ("helium", "RoPE longrope")]
)
def test_works_in_the_default_run(model_type: str, variant: str, worker: Worker) -> None:
    """What the sweep found not to work, for a softplus whose type was open, for how weights are initialized, and for a
    call that is a constant in ONNX.
    """
    result = worker.run(Case(model_type, variant or "default", variants(model_type)[variant] if variant else {}))
    assert result.outcome == "works", result.detail


# --- the sweep -------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases only where they are asked for: finding variants loads every config class."""
    if "case" in metafunc.fixturenames:
        asked = metafunc.config.getoption("markexpr") == "sweep"
        metafunc.parametrize("case", cases() if asked else [], ids=lambda case: case.name)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(LIMIT)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Of an earlier run that was cut short, by the cases' names."""
    path = Path(os.environ["SWEEP"]) if "SWEEP" in os.environ else None
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {row.pop("name"): Result(**row) for row in rows}


@pytest.mark.sweep
@pytest.mark.timeout(2 * LIMIT)
def test_type(case: Case, worker: Worker, results: dict[str, Result], capsys: pytest.CaptureFixture[str]) -> None:
    result = results.get(case.name)
    if result is None:
        result = worker.run(case)
        if "SWEEP" in os.environ:
            with open(os.environ["SWEEP"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": case.name, **asdict(result)}) + "\n")
    with capsys.disabled():
        print(f"\n{case.name:40} {result.outcome:16} {result.seconds:6.1f} s  {result.detail}")
    if result.outcome == "no reference":
        pytest.skip(f"transformers' own module does not run: {result.detail}")
    assert result.outcome in ("works", "refused"), result.detail
    if result.outcome == "refused":
        assert_says(result.detail, case.model_type)
