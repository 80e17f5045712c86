"""Programs as subjects of a benchmark, which bring runtimes of their own, and what compare_peers.py says of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bad_input import refusal
from compare_peers import agreement_words, classes_text, subject, weights_class
from peer_models.builds import PEERS, Built, Peer, build, builds_folder
from peer_models.environments import Environment, Installed

from popcompile.bench.measure import bench
from popcompile.bench.process import WorkerProcess
from popcompile.bench.subjects import Subject
from popcompile.package.manifest import read_manifest
from popcompile.report.bench import bench_text

LENGTHS, STEPS, REPEATS = [8, 12], 3, 2
MODEL = Path("model.counting").absolute()
#: a runtime whose tokens count from the prompt's first, and whose times are made up
PROGRAM = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if "load" in request:
        assert request["load"]["path"] == sys.argv[1] and request["threads"] == 1
        reply = {"seconds": 0.5, "anonymous": None, "runtime": "counting 1.2"}
    elif "warm_up" in request:
        (row,) = request["warm_up"]
        tokens = [row[0] + step for step in range(1 + request["steps"])]
        reply = {"first_token": tokens[:1], "tokens": [tokens], "anonymous": None, "peak": 7_000_000}
    else:
        (row,) = request["turn"]
        reply = {"prefill": len(row) / 1e3, "time_to_first_token": len(row) / 500, "decode": request["steps"] / 1e3}
    print(json.dumps(reply), flush=True)
"""


def program(name: str, package: Path, *command: str) -> Subject:
    vocabulary = read_manifest(package).vocab_size
    return Subject(name, "program", MODEL, vocabulary, None, required=False, command=command)


@pytest.fixture(scope="module")
def result(tiny_package: Path) -> dict[str, Any]:
    """Beside a program that ends."""
    counting = program("counting", tiny_package, sys.executable, "-c", PROGRAM, str(MODEL))
    ending = program("ending", tiny_package, sys.executable, "-c", "raise SystemExit('no such device')")
    return bench(tiny_package, [counting, ending], LENGTHS, decode_tokens=STEPS, repeats=REPEATS, threads=1)


def test_a_program(result: dict[str, Any]) -> None:
    pop, full, counting = result["subjects"]
    assert (counting["name"], counting["kind"], counting["runtime"]) == ("counting", "program", "counting 1.2")
    assert counting["memory"] == {"anonymous": None, "peak": 7_000_000} and counting["load_seconds"] == 0.5
    for length, found in zip(LENGTHS, counting["lengths"], strict=True):
        ((first, *others),) = found["continuation"]
        assert found["first_token"] == [first] and others == [first + 1, first + 2, first + 3]
        assert found["prefill"]["median"] == length / 1e3 and found["decode"]["tokens_per_second"] == 1e3
    assert pop["runtime"] is full["runtime"] is None
    assert "counting 1.2" in bench_text(result) and len(pop["lengths"][0]["continuation"][0]) == 1 + STEPS


def test_a_program_that_ends_is_left_out(result: dict[str, Any]) -> None:
    assert result["warnings"][0] == "ending: its process ended with status 1 (no such device); left out"


def test_a_program_that_is_not_there(tiny_package: Path) -> None:
    missing = program("missing", tiny_package, str(tiny_package / "nothing"))
    line = refusal(lambda: WorkerProcess(missing))
    assert line.startswith(f"missing: {tiny_package / 'nothing'} does not start (No such file or directory)")


# --- the comparison --------------------------------------------------------------------------------------------


def test_classes(result: dict[str, Any]) -> None:
    """One class, where the one peer is the fastest and the package is what its time is compared with."""
    text = classes_text(result, {"pop": "fp32", "full": "fp32"}, {"counting": "fp32"})
    rows = [line.split() for line in text.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["fp32", "pop"], ["fp32", "full"], ["fp32", "counting"]]
    (_, _, first, ratio, speed, second, *_, of, count) = rows[4]
    ours = result["subjects"][0]["lengths"][0]["time_to_first_token"]["median"]
    assert (first, speed, second) == ("16*", "1000.0*", "24*") and ratio == f"{0.016 / ours:.2f}x"
    assert (of, count) == ("of", str(1 + STEPS)) and rows[2][3] == "1.00x"


def test_a_class_of_its_own(result: dict[str, Any]) -> None:
    package = {**result["subjects"][0], "name": "/packages/quantized"}
    two = {**result, "subjects": [*result["subjects"], package]}
    packages = {"pop": "fp32", "full": "fp32", "/packages/quantized": "int4"}
    lines = classes_text(two, packages, {"counting": "int4"}).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        ["fp32", "pop"],
        ["fp32", "full"],
        ["int4", "counting"],
        ["int4", "/packages/quantized"],
    ]
    assert "*" in lines[2] and "*" not in lines[3], "no package is a peer"


def test_agreement() -> None:
    def of(*continuations: list[int]) -> dict[str, Any]:
        return {"lengths": [{"continuation": [tokens]} for tokens in continuations]}

    assert agreement_words(of([1, 2, 3], [4, 5, 6]), of([1, 2, 3], [4, 9, 6])) == "3 1 of 3"


def test_weights_of_packages() -> None:
    assert [weights_class(dtype) for dtype in ("fp32", "fp16", "w8a8", "int8", "int4")] == [
        "fp32",
        "fp32",
        "int8",
        "int8",
        "int4",
    ]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_what_runs_a_peer(peer: Peer, tmp_path: Path) -> None:
    """ONNX Runtime, which takes the folder, or a program that is there."""
    found = subject(Built(peer, "fp32", "built", tmp_path / "built" / peer.model, Installed(tmp_path)), 60, 128)
    if isinstance(found, Subject):
        (script,) = (Path(part) for part in found.command if part.endswith(("worker.py", "worker.mjs")))
        assert script.is_file() and found.path == tmp_path / "built" / peer.model and not found.required
    else:
        assert found == Path("built")


# --- building --------------------------------------------------------------------------------------------------


def test_a_changed_checkpoint_is_built_anew(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    first = builds_folder(tmp_path / "work", checkpoint)
    assert builds_folder(tmp_path / "work", checkpoint) == first
    (checkpoint / "config.json").write_text("{ }")
    assert builds_folder(tmp_path / "work", checkpoint) != first


def test_building(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second environment, where the first cannot; then it is there; and a peer that no environment builds."""
    environments = {"first": Environment(("old",)), "second": Environment(("new",))}
    for name, environment in environments.items():
        folder = tmp_path / "environments" / name
        folder.mkdir(parents=True)
        (folder / "environment.json").write_text(json.dumps(asdict(environment), indent=2))
    builds = tmp_path / "checkpoint"
    builds.mkdir()

    def commands(installed: Installed, checkpoint: Path, out: Path, word: str) -> list[list[str]]:
        script = f"import pathlib; pathlib.Path({str(out)!r}).mkdir()"
        if installed.folder.name == "first" or word == "none":
            script = "raise SystemExit('I am too old')"
        return [[sys.executable, "-c", script]]

    peer = Peer("tool", environments, {"fp32": "f32", "int4": "none"}, commands)
    found = build(peer, "fp32", tmp_path, builds)
    assert found and (found.name, found.path) == ("tool-f32", builds / "tool-f32") and found.path.is_dir()
    assert f"tool: first cannot build {tmp_path}: I am too old" in capsys.readouterr().err
    assert build(peer, "fp32", tmp_path, builds) and not capsys.readouterr().err
    assert build(peer, "int4", tmp_path, builds) is None and "tool: left out" in capsys.readouterr().err
    assert [path.name for path in builds.iterdir()] == ["tool-f32"]
