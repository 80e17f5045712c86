"""A package on disk: whole or not at all, replaced in one step, and every damage named. And which layers to prune."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from popcompile import staging
from popcompile.errors import PopcompileError
from popcompile.package import (
    MANIFEST,
    WEIGHTS,
    Manifest,
    check_external_data,
    check_files,
    describe_files,
    read_manifest,
)
from popcompile.selection import Request, format_layers, parse_request
from popcompile.staging import require_disk_space, require_writable, staged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(PopcompileError) as caught:
        call()
    message = str(caught.value)
    assert message == " ".join(message.split())
    return message


# A package that appears whole or not at all


def write(folder: Path, text: str) -> None:
    (folder / "passes").mkdir()
    (folder / "passes" / "00.txt").write_text(text)
    (folder / MANIFEST).write_text(text)


def test_a_package_appears_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        write(folder, "new")
        assert folder.parent == tmp_path and folder.name.startswith(".")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["passes", MANIFEST]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, PopcompileError])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def convert() -> None:
        with staged(tmp_path / "out") as folder:
            write(folder, "half")
            raise error

    with pytest.raises(error):
        convert()
    assert names(tmp_path) == []


def test_a_failure_leaves_the_old_package(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")

    def convert() -> None:
        with staged(tmp_path / "out", force=True) as folder:
            write(folder, "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        convert()
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / MANIFEST).read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "a system without renameat2"])
def test_force_replaces_everything(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").touch()
    with staged(tmp_path / "out", force=True) as folder:
        write(folder, "new")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["passes", MANIFEST]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange_is_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert staging._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    assert not staging._exchange(tmp_path / "a", tmp_path / "missing")


def test_a_failed_replacement_puts_the_old_package_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    temporary = tmp_path / "was removed meanwhile"
    with pytest.raises(FileNotFoundError):
        staging._put_in_place(temporary, tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / MANIFEST).read_text() == "old"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def convert() -> None:
        with staged(tmp_path / "out") as folder:
            write(folder, "ours")
            (tmp_path / "out").mkdir()
            write(tmp_path / "out", "theirs")

    assert "something appeared there meanwhile; give another folder, or --force" in refusal(convert)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / MANIFEST).read_text() == "theirs"


def test_what_killed_conversions_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = process.pid, os.getppid()
    for left in (f".a[1].partial-{dead}", f".a[1].probe-{dead}", f".a[1].replaced-{dead}"):
        (tmp_path / left).mkdir()
    others = [f".a[1].partial-{alive}", f".a.partial-{dead}", f".a1.partial-{dead}", ".a[1].partial-x", "b"]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / "a[1]").mkdir()
    with staged(tmp_path / "a[1]", force=True) as folder:
        write(folder, "new")
    assert names(tmp_path) == sorted([*others, "a[1]"])


def test_a_package_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / f".out.replaced-{process.pid}").mkdir()
    write(tmp_path / f".out.replaced-{process.pid}", "old")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", force=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / MANIFEST).read_text() == "old"


DISK = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "larger than this process or disk allows; raise the limit",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EACCES: "no permission to write there; choose another place",
    errno.EIO: "the disk fails",
}


@pytest.mark.parametrize("number", DISK)
def test_write_errors_are_named(number: int, tmp_path: Path) -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def convert() -> None:
            with staged(tmp_path / "out") as folder:
                write(folder, "half")
                raise error

        return convert

    assert DISK[number] in refusal(fail(OSError(number, os.strerror(number))))
    assert DISK[number] in refusal(fail(OSError(number, os.strerror(number), str(tmp_path / ".out.partial-1" / "x"))))
    assert names(tmp_path) == []
    elsewhere = OSError(number, os.strerror(number), "/somewhere/model.safetensors")  # reading, perhaps
    if number in (errno.EROFS, errno.EACCES, errno.EIO):
        with pytest.raises(OSError, match="somewhere"):
            fail(elsewhere)()
    else:
        assert DISK[number] in refusal(fail(elsewhere))


def test_a_disk_without_space(tmp_path: Path) -> None:
    require_disk_space(tmp_path / "out", 4096)
    message = refusal(lambda: require_disk_space(tmp_path / "out", 10**18))
    assert "the disk is full, the weights need 1000000000000.0 MB" in message and "free some space" in message


# Where a package can be put


def test_places_that_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", "old")
    before = names(tmp_path)
    require_writable(Path("new"), force=False)
    require_writable(tmp_path / "with space [1] é", force=False)
    require_writable(Path("empty/../new/"), force=False)
    require_writable(Path("empty"), force=True)
    require_writable(Path("old"), force=True)
    assert names(tmp_path) == before


def test_places_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "work")
    for place, force, words in [
        ("../work", False, "exists already; give another folder, or --force"),
        (".", True, "is no package, and --force replaces packages only; give another folder"),
        ("..", True, "is no package"),
        ("/", True, "is a mount point, which no folder can replace; give a folder in it"),
        ("notes.txt", False, "exists already"),
        ("notes.txt", True, "is no folder, and --force replaces packages only; give another folder"),
        ("../link", True, "is no folder"),
        ("../dangling", False, "exists already"),
        ("notes.txt/out", False, "there is no folder"),
        ("missing/out", False, "create it first"),
        ("x" * 300, False, "(File name too long); choose another place"),
        ("x" * 250, False, "(File name too long); choose another place"),
    ]:
        message = refusal(lambda p=place, f=force: require_writable(Path(p), f))  # type: ignore[misc]
        assert words in message and message.startswith(place), place
    assert names(tmp_path) == ["dangling", "link", "work"] and names(tmp_path / "work") == ["notes.txt"]


# A package that is read


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
    sign(out)
    return out


def sign(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits the files."""
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = Manifest(
        format_version=1, popcompile="0", source={"name": "tiny"}, model_type="llama", num_layers=2, num_kv_heads=1,
        head_size=8, vocab_size=16, context_length=64, pruned=[1], kv_projection="layer", dtype="fp32", layout="split",
        prefill_threshold=16, graphs={"prefill": "prefill.onnx", "decode": "decode.onnx"}, weights=WEIGHTS,
        inputs=["input_ids"], outputs=["logits"], versions={}, files=describe_files(folder),
    )  # fmt: skip
    (folder / MANIFEST).write_text(replace(manifest, **changes).to_json())


def external(name: str, *locations: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for location in locations:
        tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="16")
    return tensor


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto] | None = None,
    initializers: list[TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> None:
    inline = helper.make_tensor("inline", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(nodes or [], "g", [], [], [inline, *(initializers or [])])
    path.write_bytes(helper.make_model(graph, functions=functions or []).SerializeToString())


def test_a_whole_package(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.pruned == [1] and set(manifest.files) == set(names(folder)) - {MANIFEST}
    check_files(folder, manifest)
    check_files(folder, manifest, full=True)
    check_external_data(folder, manifest)


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
            if wrong != {"a": [None]} or name != "source":  # a free dictionary
                assert f"field {name} has a wrong value" in edited(folder, **{name: wrong})
    (folder / MANIFEST).write_text(json.dumps(data))
    assert "has an unknown field flavour; convert the model again" in edited(folder, flavour="x")
    (folder / MANIFEST).write_text(json.dumps(data))
    assert "was changed after the package was made; convert the model again" in edited(folder, pruned=[0])


@pytest.mark.parametrize("version", [None, "1", 0, -1, True, 1.0])
def test_odd_format_versions(version: object, folder: Path) -> None:
    assert "it has no format_version; convert the model again" in edited(folder, format_version=version)


def test_a_newer_format(folder: Path) -> None:
    message = edited(folder, format_version=2, another_field=1)
    assert "format version 2 is newer than this popcompile reads (1); upgrade popcompile" in message


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


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph", "function"])
@pytest.mark.parametrize("locations", OUTSIDE)
def test_external_data_outside(locations: tuple[str, ...], where: str, folder: Path) -> None:
    tensor = external("bad", *locations)
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([constant], "b", [], [])
    path = folder / "decode.onnx"
    if where == "initializer":
        save_graph(path, initializers=[tensor])
    elif where == "constant":
        save_graph(path, nodes=[constant])
    elif where == "subgraph":
        save_graph(path, nodes=[helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)])
    else:
        imports = [helper.make_opsetid("", 21)]
        save_graph(path, functions=[helper.make_function("own", "F", [], ["c"], [constant], imports)])
    sign(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, full=True)  # the hashes fit
    message = refusal(lambda: check_external_data(folder, manifest))
    assert "decode.onnx reads bad from" in message and "do not use it" in message


def test_a_graph_that_is_no_onnx(folder: Path) -> None:
    (folder / "prefill.onnx").write_bytes(b"\xff" * 100)
    assert "prefill.onnx is not a readable ONNX file; convert" in refusal(
        lambda: check_external_data(folder, read_manifest(folder))
    )


# Which layers to prune


@pytest.mark.parametrize(
    ("prune", "count"),
    [("0", 0), (0, 0), ("10", 10), (29, 29), (" 7 ", 7), ("1/3", 10), ("0/1", 0), ("0.0", 0), (0.33, 10),
     (".5", 15), (1 / 3, 10), (1e-5, 0), ("0.96", 29)],
)  # fmt: skip
def test_how_many_layers(prune: str | int | float | None, count: int) -> None:
    assert parse_request(30, prune, None).layers == list(range(30 - count, 30))


@pytest.mark.parametrize("prune", [None, "auto", " AUTO "])
def test_popcompile_chooses(prune: str | None) -> None:
    assert parse_request(30, prune, None) == Request("auto", [])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("17", [17]),
        ("20-29,17", [17, *range(20, 30)]),
        (" 3 , 1-2 ", [1, 2, 3]),
        ("5-5,5", [5]),
        ("0-28", [*range(29)]),
    ],
)
def test_which_layers(layers: str, chosen: list[int]) -> None:
    assert parse_request(30, None, layers).layers == chosen


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_layers_are_read_as_they_are_printed(case: tuple[int, set[int]]) -> None:
    num_layers, layers = case
    text = format_layers(sorted(layers))
    if layers:
        assert parse_request(num_layers, None, text).layers == sorted(layers)
    else:
        assert text == "none"


@given(st.integers(1, 200), st.fractions(0, 1, max_denominator=1000).filter(lambda f: f.denominator > 1))
def test_a_fraction_never_takes_every_layer(num_layers: int, fraction: Any) -> None:
    try:
        pruned = parse_request(num_layers, str(fraction), None).layers
    except PopcompileError:
        assert fraction * num_layers >= num_layers - 0.5
    else:
        assert len(pruned) < num_layers and abs(len(pruned) - fraction * num_layers) <= 0.5
