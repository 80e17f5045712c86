"""Damaged packages: every command says in one line what is wrong and how to fix it, exit status 2."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from bad_input import Cli, save_model
from resign import sign

from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.package.manifest import LAYOUTS, MANIFEST, REPORT, check_files, read_manifest

WEIGHTS = LAYOUTS["split"].weights

#: every command that takes a package, with the rest of its arguments
COMMANDS = {"inspect": [], "inspect --json": ["--json"], "verify": [], "run": ["--prompt", "the cat"]}
COMMANDS |= {"bench": ["--lengths", "8", "--decode-tokens", "2"]}


@pytest.fixture(scope="module")
def other_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with files of the same names and sizes: other weights, another epsilon in its norms."""
    parent = tmp_path_factory.mktemp("others")
    convert(save_model(parent / "model", seed=1, rms_norm_eps=1e-5), parent / "out", prune=1)
    return parent / "out"


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def edit_manifest(package: Path, **changes: Any) -> None:
    path = package / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_field(package: Path) -> None:
    content = json.loads((package / MANIFEST).read_text())
    del content["pruned"]
    (package / MANIFEST).write_text(json.dumps(content))


def point_outside(package: Path, location: str) -> None:
    """Let a graph read another file, with hashes that fit."""
    model = onnx.load(package / "prefill.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (package / "prefill.onnx").write_bytes(model.SerializeToString())
    sign(package)


def name_outside(package: Path, name: str) -> None:
    manifest = read_manifest(package)
    files = manifest.files | {name: {"size": 0, "sha256": ""}}
    (package / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())


def odd_report(package: Path, content: str) -> None:
    (package / REPORT).write_text(content)
    sign(package)


CHANGED = "is not the file that this package was made with (changed, damaged, or of another package); convert the model"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"byte of {name}": (lambda p, name=name: flip(p / name), f"{name} {CHANGED}")  # type: ignore[misc]
        for name in (
            WEIGHTS, "prefill.onnx", "decode.onnx", REPORT, "tokenizer.json", "config.json", "genai_config.json",
            "passes/traced.model.txt",
        )
    },
    **{
        f"byte of the manifest at {at}": (lambda p, at=at: flip(p / MANIFEST, at), MANIFEST)  # type: ignore[misc]
        for at in (0.0, 0.2, 0.5, 0.9)
    },
    "cut short": (lambda p: os.truncate(p / WEIGHTS, 1000), f"{WEIGHTS} {CHANGED}"),
    "not JSON": (lambda p: (p / MANIFEST).write_text("{"), "is not JSON"),
    "a list": (lambda p: (p / MANIFEST).write_text("[]"), "not a popcompile manifest, it has no format_version"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), f"not a popcompile package, it has no {MANIFEST}; give the"),
    "older": (lambda p: edit_manifest(p, format_version=1), "was made by an older popcompile (format version 1"),
    "newer": (lambda p: edit_manifest(p, format_version=99), "format version 99 is newer than this popcompile reads"),
    "unknown field": (lambda p: edit_manifest(p, flavour=1), "has an unknown field flavour; convert the model again"),
    "missing field": (drop_field, "has no field pruned; convert the model again"),
    "wrong field": (lambda p: edit_manifest(p, pruned="1"), "field pruned has a wrong value; convert the model again"),
    "edited": (lambda p: edit_manifest(p, pruned=[0]), "was changed after the package was made; convert the model"),
    "name outside": (lambda p: name_outside(p, "../x"), "names '../x', which is outside the package; do not use it"),
    "absolute name": (lambda p: name_outside(p, "/etc/passwd"), "names '/etc/passwd', which is outside the package"),
    "data outside": (lambda p: point_outside(p, "../x.data"), "from '../x.data' and not from the package's"),
    "data elsewhere": (lambda p: point_outside(p, "/etc/passwd"), "from '/etc/passwd' and not from the package's"),
    "no graph": (lambda p: ((p / "decode.onnx").write_bytes(b"\xff"), sign(p)), "decode.onnx is not a readable ONNX"),
}  # fmt: skip
REPORTS = {"not JSON": "{", "a list": "[]", "empty": "{}", "odd": '{"passes": [{"name": 1}], "layers": 1, "flops": {}}'}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_package(damage: str, command: str, cli: Cli, package: Path) -> None:
    change, words = DAMAGE[damage]
    change(package)
    assert words in cli.refuses(command.split()[0], package, *COMMANDS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_files(command: str, cli: Cli, package: Path) -> None:
    for name in read_manifest(package).files:
        content = (package / name).read_bytes()
        (package / name).unlink()
        line = cli.refuses(command.split()[0], package, *COMMANDS[command])
        assert f"{name} is missing; convert the model again" in line
        (package / name).write_bytes(content)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_two_packages(command: str, cli: Cli, package: Path, other_package: Path) -> None:
    for name in (WEIGHTS, "decode.onnx", "prefill.onnx"):
        content = (package / name).read_bytes()
        assert (other_package / name).stat().st_size == len(content)
        shutil.copyfile(other_package / name, package / name)
        line = cli.refuses(command.split()[0], package, *COMMANDS[command])
        assert f"{name} {CHANGED}" in line
        (package / name).write_bytes(content)


@pytest.mark.parametrize("command", COMMANDS)
def test_not_a_package(command: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    def line(path: Path) -> str:
        return cli.refuses(command.split()[0], path, *COMMANDS[command])

    assert "no such package folder; make one with `popcompile convert" in line(tmp_path / "nothing")
    assert "no such package folder" in line(model / "config.json")
    assert "no such package folder" in line(Path("org/hub-id"))
    assert f"not a popcompile package, it has no {MANIFEST}; give the folder that" in line(model)
    assert "File name too long; give another" in line(tmp_path / ("x" * 300))


@pytest.mark.parametrize("content", REPORTS)
def test_odd_reports(content: str, cli: Cli, package: Path) -> None:
    odd_report(package, REPORTS[content])
    line = cli.refuses("inspect", package)
    assert REPORT in line and "convert the model again" in line


def test_weights_are_read_whole_only_by_verify(cli: Cli, package: Path) -> None:
    """`verify` alone hashes every byte of the weights; here of ones that are larger than all samples together."""
    with (package / WEIGHTS).open("r+b") as file:
        file.truncate(8 << 20)
    sign(package)
    with (package / WEIGHTS).open("r+b") as file:
        file.seek((8 << 20) - 100_000)
        file.write(b"x")
    check_files(package, read_manifest(package))
    with pytest.raises(PopcompileError, match=f"{WEIGHTS} is not the file"):
        check_files(package, read_manifest(package), full=True)
    assert f"{WEIGHTS} {CHANGED}" in cli.refuses("verify", package)
    assert cli.run("inspect", package)[0] == 0
