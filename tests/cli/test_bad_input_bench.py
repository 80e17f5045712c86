"""Bad input to `popcompile bench`: one line on stderr with cause and fix, status 2, nothing changed on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from bad_input import Cli, assert_one_line, popcompile, save_model, snapshot
from peers import genai_folder, save_mean_decoder

from popcompile.bench.measure import bench
from popcompile.cli import main
from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.package.manifest import LAYOUTS

WEIGHTS = LAYOUTS["split"].weights

SMALL = ["--lengths", "8", "--decode-tokens", "2", "--repeats", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "63"], "--lengths 63 and --decode-tokens 2 are more than the context of 64"),
        (["--lengths", "8,9999"], "--lengths 9999 and --decode-tokens 2"),
        (["--decode-tokens", "57"], "lower one of them"),
        *((["--lengths", text], "is not a list of numbers of at least 1, for example 256,1024")
          for text in ("", "0", "-1", "8,", "8,,9", "1.5", "long", "8;9", "9" * 30)),
        (["--lengths", "8,8"], "--lengths 8,8: give each length once"),
        (["--repeats", "0"], "--repeats"),
        (["--repeats", "few"], "--repeats"),
        (["--batch", "0"], "--batch"),
        (["--decode-tokens", "0"], "--decode-tokens"),
        (["--threads", "0"], "--threads"),
        (["--threads", "99999"], "--threads 99999: this machine has"),
        (["--seed", "-1"], "--seed"),
        (["--provider", "tpu"], "provider tpu: unknown; choose one of cpu, cuda"),
        (["--provider", "cuda"], "provider cuda"),
        (["--runtime", "vllm"], "--runtime vllm: unknown; choose one of popcompile, onnxruntime-genai"),
        (["--plot", "times.pdf"], "--plot times.pdf: unknown format; end the name in .svg or .png"),
        (["--plot", "no-such-folder/times.svg"], "there is no folder no-such-folder"),
        (["--against"], "--against"),
        (["--nonsense"], "--nonsense"),
    ],
)  # fmt: skip
def test_arguments(arguments: list[str], words: str, cli: Cli, package: Path) -> None:
    assert words in cli.refuses("bench", package, *SMALL, *arguments)


def test_the_api_checks_its_numbers(package: Path) -> None:
    for arguments in ({"lengths": [0]}, {"batch": 0}, {"decode_tokens": 0}, {"repeats": 0}):
        with pytest.raises(PopcompileError, match="is not a number of at least 1"):
            bench(package, **{"lengths": [8]} | arguments)  # type: ignore[arg-type]
    for arguments in ({"lengths": []}, {"threads": 0}, {"seed": -1}):
        with pytest.raises(PopcompileError, match=r"give|is not a seed"):
            bench(package, **{"lengths": [8]} | arguments)  # type: ignore[arg-type]


# --- what is given to compare with -----------------------------------------------------------------------------

NOTHING = "nothing that bench can run, "
NONE_OF_THEM = f"{NOTHING}it has none of them; looked for a popcompile package (popcompile.json), an onnxruntime-genai"


def write_config(folder: Path, content: str) -> Path:
    (folder / "genai_config.json").write_text(content)
    return folder


def config(folder: Path, **decoder: Any) -> Path:
    content = json.loads((folder / "genai_config.json").read_text())
    content["model"]["decoder"] |= decoder
    return write_config(folder, json.dumps(content))


def rename(folder: Path, old: str, new: str) -> Path:
    """Another name for an input or an output of the graph."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def write(path: Path, content: bytes = b"") -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def two_graphs(folder: Path) -> Path:
    for name in ("decoder.onnx", "encoder.onnx"):
        save_mean_decoder(folder / name)
    return folder


def mean(path: Path, **changes: Any) -> Path:
    save_mean_decoder(path, **changes)
    return path


#: what becomes of an empty folder, or of one that is a peer; what is given; what the line says
PEERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda empty, peer: empty / "nothing", "there is no such folder or file; give one that is there"),
    "empty": (lambda empty, peer: empty, NONE_OF_THEM),
    "text file": (lambda empty, peer: write(empty / "notes.txt", b"x"), f"{NOTHING}it is no .onnx file"),
    "no weights of a checkpoint": (lambda empty, peer: without_weights(save_model(empty / "m")), NONE_OF_THEM),
    "no graph file": (lambda empty, peer: write(empty / "a.onnx", b"\xff"), "not a readable ONNX file; give another"),
    "two graphs": (lambda empty, peer: two_graphs(empty), "has 2 graphs (decoder.onnx, encoder.onnx); give the file"),
    "config is no JSON": (lambda empty, peer: write_config(peer, "{"), "genai_config.json is not JSON"),
    "config is a list": (lambda empty, peer: write_config(peer, "[]"), "genai_config.json is not a JSON object"),
    "config of nothing": (lambda empty, peer: write_config(peer, "{}"), "describes no decoder"),
    "pipeline": (lambda empty, peer: config(peer, pipeline=[]), "its genai_config.json describes several graphs"),
    "vision": (lambda empty, peer: write_config(peer, '{"model": {"decoder": {}, "vision": {}}}'), "several graphs"),
    "other graph": (lambda empty, peer: config(peer, filename="x.onnx"), "names the graph x.onnx, which is not there"),
    "bad name": (lambda empty, peer: config(peer, inputs={"past_key_names": 3}), "past_key_names is not a name; fix"),
    "no %d": (lambda empty, peer: config(peer, inputs={"past_key_names": "past"}), "past_key_names is not a name"),
    "no ids": (lambda empty, peer: rename(peer, "input_ids", "ids"), "it has no input input_ids; looked for input_ids"),
    "no logits": (lambda empty, peer: rename(peer, "logits", "scores"), "it has no output logits"),
    "no key": (lambda empty, peer: rename(peer, "past_key_values.1.key", "k"), "of the same layers"),
    "no present": (lambda empty, peer: rename(peer, "present.1.value", "v"), "it has no output present.1.value"),
    "no cache": (lambda empty, peer: config(peer, inputs={"past_key_names": "p%d"}), "it has no inputs pN and"),
    "an input more": (lambda empty, peer: mean(empty / "m.onnx", input="use_cache_branch"), "input use_cache_branch"),
    "fixed cache": (lambda empty, peer: mean(empty / "m.onnx", past=16), "its cache has a fixed length of 16 tokens"),
    "doubles": (lambda empty, peer: mean(empty / "m.onnx", dtype="float64"), "has a type that bench does not know"),
}  # fmt: skip


@pytest.mark.parametrize("case", PEERS)
def test_peers(case: str, cli: Cli, package: Path, tmp_path: Path) -> None:
    make, words = PEERS[case]
    (tmp_path / "empty").mkdir()
    path = make(tmp_path / "empty", genai_folder(package, tmp_path / "peer"))
    line = cli.refuses("bench", package, *SMALL, "--against", path)
    assert words in line and str(path) in line


def test_the_same_twice(cli: Cli, package: Path, tmp_path: Path) -> None:
    peer = genai_folder(package, tmp_path / "peer")
    (tmp_path / "link").symlink_to(peer)
    twice = "is given twice, or is OUT itself; leave it out"
    for given in ([package], [peer, peer], [peer, peer / "model.onnx"], [peer, tmp_path / "link"]):
        assert twice in cli.refuses("bench", package, *SMALL, "--against", *given)


def test_a_peer_with_a_shorter_context(cli: Cli, package: Path, tmp_path: Path) -> None:
    peer = genai_folder(package, tmp_path / "peer", context_length=16)
    line = cli.refuses("bench", package, "--lengths", "15", "--decode-tokens", "2", "--against", peer)
    assert f"are more than the context of 16 of {peer}; lower one of them" in line


def test_packages_that_are_damaged(cli: Cli, package: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(package, tmp_path / "other"))
    (other / "decode.onnx").write_bytes(b"damaged")
    assert f"{other}: decode.onnx is not the file" in cli.refuses("bench", package, *SMALL, "--against", other)
    assert f"{other}: decode.onnx is not the file" in cli.refuses("bench", other, *SMALL)


def test_folders_that_are_no_packages(cli: Cli, package: Path, tmp_path: Path) -> None:
    assert "no such package folder" in cli.refuses("bench", tmp_path / "missing", *SMALL)
    peer = genai_folder(package, tmp_path / "peer")
    assert "not a popcompile package" in cli.refuses("bench", peer, *SMALL, "--against", package)


def test_what_a_user_types(package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What workers print too, for nothing may slip past: no traceback, no leftovers."""
    peer = genai_folder(package, tmp_path / "peer")
    write(peer / WEIGHTS)
    before = snapshot(tmp_path)
    status = main(["bench", str(package), *SMALL, "--against", str(peer), "--json"])
    out, err = capfd.readouterr()
    assert_one_line(status, out, err)
    assert err.startswith(f"popcompile: error: {peer / 'model.onnx'}: does not load in onnxruntime ")
    assert "build it again, or leave it out" in err
    assert snapshot(tmp_path) == before
    shown = popcompile("bench", "--help")
    assert shown.returncode == 0 and "example: popcompile bench" in shown.stdout


def test_a_package_of_another_dtype_is_measured_too(tmp_path: Path) -> None:
    """fp16 weights against fp32's: no error, and whatever their first tokens are."""
    save_model(tmp_path / "model")
    for dtype in ("fp32", "fp16"):
        convert(tmp_path / "model", tmp_path / dtype, prune=1, kv_projection="layer", dtype=dtype)
    found = bench(tmp_path / "fp16", [tmp_path / "fp32"], lengths=[8], decode_tokens=2, repeats=1)
    assert [subject["name"] for subject in found["subjects"]] == ["pop", "full", str(tmp_path / "fp32")]
