"""A package that is read: every damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from bad_input import names, refusal
from onnx import TensorProto, helper

from popcompile.errors import PopcompileError
from popcompile.export.io_names import input_names, output_names
from popcompile.package.graph_check import read_graphs
from popcompile.package.integrity import check_files, describe_files
from popcompile.package.manifest import FORMAT_VERSION, LAYOUTS, MANIFEST, Manifest, _checksum, read_manifest

WEIGHTS = LAYOUTS["split"].weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package of two graphs that read one tensor, and 8 MB of weights."""
    out = tmp_path / "out"
    out.mkdir()
    with (out / WEIGHTS).open("wb") as file:
        file.truncate(8 << 20)
    for name in ("prefill.onnx", "decode.onnx"):
        save_graph(out / name, initializers=[external("w", WEIGHTS)])
    (out / "report.json").write_text("{}")
    (out / "config.json").write_text("{}")
    sign(out)
    return out


def sign(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits the files."""
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = Manifest(
        format_version=FORMAT_VERSION, popcompile="0", source={"name": "tiny"}, model_type="llama", num_layers=2,
        num_kv_heads=1,
        head_size=8, vocab_size=16, context_length=64, pruned=[1], kv_projection="layer", dtype="fp32",
        block_size=0, provider="cpu", layout="split",
        window=64, graphs={"prefill": "prefill.onnx", "decode": "decode.onnx"}, weights=WEIGHTS,
        inputs=input_names(2), outputs=output_names(2), versions={}, files=describe_files(folder, WEIGHTS),
    )  # fmt: skip
    (folder / MANIFEST).write_text(replace(manifest, **changes).to_json())


def external(name: str, *locations: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for location in locations:
        tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="length", value="16")
    return tensor


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto] | None = None,
    initializers: list[TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> None:
    def values(names: list[str], first: list[Any]) -> list[onnx.ValueInfoProto]:
        cache = (TensorProto.FLOAT, ["batch", 1, "tokens", 8])
        return [helper.make_tensor_value_info(n, *s) for n, s in zip(names, first + [cache] * 4, strict=True)]

    tokens = (TensorProto.INT64, ["batch", "tokens"])
    logits = (TensorProto.FLOAT, ["batch", 1 if path.name == "prefill.onnx" else "tokens", 16])
    inline = helper.make_tensor("inline", TensorProto.FLOAT, [1], [1.0])
    inputs, outputs = values(input_names(2), [tokens, tokens]), values(output_names(2), [logits])
    graph = helper.make_graph(nodes or [], "g", inputs, outputs, [inline, *(initializers or [])])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, functions=functions or [], opset_imports=opsets).SerializeToString())


def test_a_whole_package(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.pruned == [1] and set(manifest.files) == set(names(folder)) - {MANIFEST}
    check_files(folder, manifest)
    check_files(folder, manifest, full=True)
    assert list(read_graphs(folder, manifest)) == ["prefill", "decode"]


def test_every_changed_bit_of_the_manifest_is_seen(folder: Path) -> None:
    path, original = folder / MANIFEST, read_manifest(folder)
    content = path.read_bytes()
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            assert read_manifest(folder) == original  # another white space
        except PopcompileError:
            continue


def edited(folder: Path, **changes: Any) -> str:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return refusal(lambda: read_manifest(folder))


def test_every_manifest_field_is_checked(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    for name in data:
        if name in ("format_version", "manifest_sha256"):
            continue
        (folder / MANIFEST).write_text(json.dumps({k: v for k, v in data.items() if k != name}))
        assert f"has no field {name}; convert the model again" in refusal(lambda: read_manifest(folder))
        (folder / MANIFEST).write_text(json.dumps(data))
        for wrong in (None, True, 1.5, [None], {"a": [None]}):
            if wrong != {"a": [None]} or name not in ("source", "vision"):  # free dictionaries
                assert f"field {name} has a wrong value" in edited(folder, **{name: wrong})
    (folder / MANIFEST).write_text(json.dumps(data))
    assert "has an unknown field flavour; convert the model again" in edited(folder, flavour="x")
    (folder / MANIFEST).write_text(json.dumps(data))
    assert "was changed after the package was made; convert the model again" in edited(folder, pruned=[0])


@pytest.mark.parametrize("version", [None, "1", 0, -1, True, 1.0])
def test_odd_format_versions(version: object, folder: Path) -> None:
    assert "it has no format_version; convert the model again" in edited(folder, format_version=version)


def test_a_newer_format(folder: Path) -> None:
    message = edited(folder, format_version=FORMAT_VERSION + 1, another_field=1)
    assert f"format version {FORMAT_VERSION + 1} is newer than this popcompile reads ({FORMAT_VERSION});" in message


def test_the_format_before_windows(folder: Path) -> None:
    """A package of format version 2 is one whose window is the boundary token."""
    data = json.loads((folder / MANIFEST).read_text())
    del data["manifest_sha256"], data["window"]
    data |= {"format_version": 2, "prefill_threshold": 16}
    text = json.dumps(data | {"manifest_sha256": _checksum(data)})
    (folder / MANIFEST).write_text(text)
    assert read_manifest(folder).window == 1
    (folder / MANIFEST).write_text(text.replace('"prefill_threshold": 16', '"prefill_threshold": 17'))
    assert "was changed after the package was made" in refusal(lambda: read_manifest(folder))
    assert "was made by an older popcompile (format version 1," in edited(folder, format_version=1)


NOT_MANIFESTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"format_version": %s}' % (b"9" * 5000),
]


@pytest.mark.parametrize("content", NOT_MANIFESTS, ids=range(len(NOT_MANIFESTS)))
def test_what_is_no_manifest(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    message = refusal(lambda: read_manifest(folder))
    assert MANIFEST in message and "convert the model again" in message


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "\\\\host\\x", "", "."])
def test_names_outside_the_package(name: str, folder: Path) -> None:
    listed = read_manifest(folder).files
    for changes in (
        {"files": listed | {name: {"size": 1, "sha256": "0"}}},
        {"graphs": {"prefill": name, "decode": "decode.onnx"}},
        {"weights": name},
    ):
        sign(folder, **changes)
        assert f"names {name!r}, which is outside the package; do not use it" in refusal(lambda: read_manifest(folder))


def test_graphs_that_no_hash_covers(folder: Path) -> None:
    files = read_manifest(folder).files
    sign(folder, files={name: entry for name, entry in files.items() if name != "decode.onnx"})
    assert "does not list decode.onnx among its files" in refusal(lambda: read_manifest(folder))


def test_files_of_the_wrong_kind(folder: Path, tmp_path: Path) -> None:
    assert "no such package folder; make one" in refusal(lambda: read_manifest(tmp_path / "missing"))
    assert "no such package folder" in refusal(lambda: read_manifest(folder / MANIFEST))
    assert "(File name too long)" in refusal(lambda: read_manifest(tmp_path / ("x" * 300)))
    manifest = read_manifest(folder)
    (folder / "report.json").unlink()
    (folder / "report.json").mkdir()
    assert "report.json is not the file" in refusal(lambda: check_files(folder, manifest))
    (folder / MANIFEST).unlink()
    assert f"it has no {MANIFEST}; give the folder that" in refusal(lambda: read_manifest(folder))
    (folder / MANIFEST).mkdir()
    assert "cannot be read (Is a directory)" in refusal(lambda: read_manifest(folder))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_weights_are_sampled_and_on_request_hashed(folder: Path) -> None:
    manifest = read_manifest(folder)
    flip(folder / WEIGHTS, 100_000)  # between two samples
    check_files(folder, manifest)
    assert f"{WEIGHTS} is not the file" in refusal(lambda: check_files(folder, manifest, full=True))
    flip(folder / WEIGHTS, 100_000)
    for at in (0, (8 << 20) - 1):
        flip(folder / WEIGHTS, at)
        assert f"{WEIGHTS} is not the file" in refusal(lambda: check_files(folder, manifest))
        flip(folder / WEIGHTS, at)
    check_files(folder, manifest, full=True)


OUTSIDE = [
    ("../other.data",),
    ("/etc/passwd",),
    ("report.json",),
    (),
    (WEIGHTS, "../other.data"),
    (f"./../out/{WEIGHTS}",),
]


@pytest.mark.parametrize("locations", OUTSIDE)
def test_external_data_outside(locations: tuple[str, ...], folder: Path) -> None:
    save_graph(folder / "decode.onnx", initializers=[external("bad", *locations)])
    sign(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, full=True)  # the hashes fit
    message = refusal(lambda: read_graphs(folder, manifest))
    assert "decode.onnx: reads bad from" in message and "do not use it" in message


def test_external_data_elsewhere_in_a_graph(folder: Path) -> None:
    """Where no weight of a package is: in an attribute, a branch, a function."""
    constant = helper.make_node("Constant", [], ["c"], value=external("bad", "../x"))
    branch = helper.make_graph([constant], "b", [], [])
    both = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    function = helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 21)])
    for contents, words in (
        ({"nodes": [constant]}, "has an operator ::Constant"),
        ({"nodes": [both]}, "has an operator ::Constant"),
        ({"functions": [function]}, "has functions or training graphs"),
    ):
        save_graph(folder / "decode.onnx", **contents)  # type: ignore[arg-type]
        sign(folder)
        assert words in refusal(lambda: read_graphs(folder, read_manifest(folder)))


def test_a_graph_that_is_no_onnx(folder: Path) -> None:
    (folder / "prefill.onnx").write_bytes(b"\xff" * 100)
    sign(folder)
    assert "prefill.onnx is not a readable ONNX file; convert" in refusal(
        lambda: read_graphs(folder, read_manifest(folder))
    )
