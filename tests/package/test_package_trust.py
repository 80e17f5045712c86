"""Packages made to do harm, with hashes that are right: no code runs, nothing outside is read, nothing hangs."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import Cli, names, refusal, snapshot
from resign import sign

import popcompile
from popcompile.package.configs import load_tokenizer
from popcompile.package.integrity import check_files
from popcompile.package.manifest import MANIFEST, read_manifest
from popcompile.package.staging import require_apart, staged

#: every command that takes a package
COMMANDS = {
    "run": ["--prompt", "the cat", "--max-new-tokens", "2"],
    "run --chat": ["--chat", "--max-new-tokens", "2"],
    "verify": [],
    "inspect": [],
    "evaluate": ["--prompts", "1", "--prompt-tokens", "20", "--continuation-tokens", "2"],
    "bench": ["--lengths", "8", "--decode-tokens", "2"],
}
QUICK = {name: COMMANDS[name] for name in ("run", "verify", "inspect")}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(cli: Cli, package: Path, words: str, commands: dict[str, list[str]] = QUICK) -> None:
    for command, arguments in commands.items():
        assert words in cli.refuses(command.split()[0], package, *arguments), command


# --- code ------------------------------------------------------------------------------------------------------

OWN = {
    "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}},
    "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
    "generation_config.json": {"auto_map": {"AutoConfig": "own.Own"}},
}


@pytest.mark.parametrize("hidden", [False, True], ids=["beside", "in the hub's cache"])
@pytest.mark.parametrize("name", OWN)
def test_no_code_of_a_package_runs(
    name: str, hidden: bool, cli: Cli, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks "Do you wish to run the custom code? [y/N]" on the terminal."""
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n"
    edit(package / name, **OWN[name])
    if not hidden:
        (package / "own.py").write_text(code)
    sign(package, **({"model_type": "own"} if name == "config.json" else {}))
    for command, arguments in COMMANDS.items():
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))
        line = cli.refuses(command.split()[0], package, *arguments)
        assert "which no package needs; do not use it, convert the model again" in line, command
    assert "which no package needs" in refusal(lambda: popcompile.load(package))
    assert not marker.exists()


def test_code_in_a_folder_that_no_manifest_lists(cli: Cli, package: Path) -> None:
    (package / "own.py").write_text("raise SystemExit")
    refused(cli, package, "has own.py, which its manifest does not list", COMMANDS)


def test_a_model_of_remote_code_becomes_a_package_without(
    tmp_path: Path, tiny_checkpoint: Path, tiny_package: Path
) -> None:
    model, marker = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model")), tmp_path / "marker"
    edit(
        model / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (model / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    popcompile.convert(model, tmp_path / "out", prune=1, trust_remote_code=True, kv_projection="layer")
    assert marker.exists()
    marker.unlink()
    assert "own.py" not in names(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    loaded = popcompile.load(tmp_path / "out")
    assert loaded.config.model_type == "own"
    assert torch.equal(loaded(ids).logits, popcompile.load(tiny_package)(ids).logits), "it is the same model"
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"model_type": "llama", "num_hidden_layers": "2"}', "config.json says num_hidden_layers '2'"),
        ("generation_config.json", "[]", "generation_config.json is not a JSON object"),
        ("generation_config.json", '{"bos_token_id": {"": null}}', "generation_config.json: bos_token_id is"),
        ("tokenizer_config.json", '{"model_max_length": {"type": "x"}}', "tokenizer_config.json: model_max_length is"),
        ("tokenizer.json", "{}", "the package has no usable tokenizer"),
    ],
)
def test_verify_reads_what_loading_reads(name: str, content: str, words: str, cli: Cli, package: Path) -> None:
    (package / name).write_text(content)
    sign(package)
    for command in ("verify", "run"):
        assert words in cli.refuses(command, package, *COMMANDS[command]), command


def test_a_manifest_that_is_a_link(cli: Cli, package: Path, tmp_path: Path) -> None:
    (package / MANIFEST).rename(tmp_path / "elsewhere.json")
    (package / MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    refused(cli, package, f"{MANIFEST}: is a link that leads out of the package; put the file itself there")


def test_json_without_numbers_that_json_has_not(cli: Cli, package: Path) -> None:
    edit(package / "report.json", seconds=float("nan"))
    sign(package)
    status, out, _ = cli.run("inspect", package, "--json")
    assert status == 0 and json.loads(out)["report"]["seconds"] is None and "NaN" not in out


def test_names_are_printed_escaped(cli: Cli, package: Path) -> None:
    """A manifest's strings are anyone's; a terminal obeys some of them."""
    sign(package, source={"name": "a\x1b[2Jb\u202ec", "kind": "folder"})
    for arguments in ([], ["--json"]):
        status, out, _ = cli.run("inspect", package, *arguments)
        assert status == 0 and "\x1b" not in out and "\u202e" not in out and "202e" in out


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "added_tokens.json", "additional_chat_templates/x.jinja", "notes.txt", "x.onnx"]
)
def test_files_that_no_manifest_lists(name: str, cli: Cli, package: Path) -> None:
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("{}")
    refused(cli, package, f"has {name}, which its manifest does not list and which may change what it answers; remove")
    assert "does not list" in refusal(lambda: popcompile.load(package))


def test_files_that_nobody_reads(cli: Cli, package: Path) -> None:
    for name in (".DS_Store", ".gitattributes", ".cache/huggingface/x.json", "README.md", "page.html"):
        (package / name).parent.mkdir(exist_ok=True, parents=True)
        (package / name).write_text("x")
    assert cli.run("verify", package)[0] == 0


@pytest.mark.parametrize("name", ["config.json", "report.json", "decode.onnx", "weights.onnx.data"])
def test_manifests_that_leave_out_what_is_read(name: str, cli: Cli, package: Path) -> None:
    files = read_manifest(package).files
    sign(package, files={key: entry for key, entry in files.items() if key != name})
    refused(cli, package, f"does not list {name} among its files")


def link_out(path: Path) -> None:
    shutil.copyfile(path, path.parents[1] / "elsewhere")
    path.unlink()
    path.symlink_to(path.parents[1] / "elsewhere")


def to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def grown(path: Path) -> None:
    os.truncate(path, 1 << 40)  # takes no disk


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices of a Unix")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "prefill.onnx", "weights.onnx.data", "report.json"])
def test_what_is_no_file_of_the_package(name: str, cli: Cli, package: Path) -> None:
    content = (package / name).read_bytes()
    for change, words in (
        (link_out, f"{name} is a link that leads out of the package; put the file itself there"),
        (to_device, f"{name} is a link that leads out of the package"),
        (to_pipe, f"{name} is not a regular file; convert the model again"),
        (grown, f"{name} is not the file that this package was made with"),
    ):
        change(package / name)
        for command, arguments in QUICK.items():
            status, _, line = cli.run(command, package, *arguments)
            assert status == 2 and words in line, line
        (package / name).unlink()
        (package / name).write_bytes(content)
    check_files(package, read_manifest(package), full=True)


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices of a Unix")
def test_a_manifest_that_is_no_file(cli: Cli, package: Path) -> None:
    path = package / MANIFEST
    for change, words in (
        (to_pipe, "cannot be read (not a regular file)"),
        (to_device, "cannot be read (not a regular file)"),
        (grown, "cannot be read (larger than 4 MB)"),
    ):
        path.unlink(missing_ok=True)
        path.touch()
        change(path)
        for command, arguments in QUICK.items():
            status, _, line = cli.run(command, package, *arguments)
            assert status == 2 and words in line, line


def test_links_inside_a_package(cli: Cli, package: Path, tmp_path: Path) -> None:
    """They are the package's own; and OUT may be a link itself."""
    (package / ".config").write_bytes((package / "config.json").read_bytes())
    (package / "config.json").unlink()
    (package / "config.json").symlink_to(".config")
    (tmp_path / "link").symlink_to(package)
    assert cli.run("verify", tmp_path / "link")[0] == 0
    (package / "passes").rename(tmp_path / "passes")
    (package / "passes").symlink_to(tmp_path / "passes")
    refused(cli, package, "has passes, which its manifest does not list")


def test_files_that_claim_to_be_large(cli: Cli, package: Path) -> None:
    files = read_manifest(package).files
    for name, words in (("prefill.onnx", "larger than 32 MB"), ("config.json", "larger than 16 MB")):
        sign(package, files=files | {name: files[name] | {"size": 1 << 29}})
        refused(cli, package, f"{name} is {words}")


# --- one package after another ---------------------------------------------------------------------------------


@pytest.fixture
def other_package(tiny_package: Path, tmp_path: Path) -> Path:
    """Of another model: the same graphs over other weights."""
    out = Path(shutil.copytree(tiny_package, tmp_path / "other"))
    path = out / read_manifest(out).weights
    weights = np.fromfile(path, np.float32)
    (weights[::-1] * 0.5).tofile(path)
    sign(out)
    return out


def test_graphs_and_weights_stay_together(package: Path, other_package: Path, tiny_package: Path) -> None:
    """decode.onnx is opened when it is first asked for: by then another package may have its place."""
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = popcompile.load(package)(ids).logits
    model = popcompile.load(package)
    first = model(ids, prefill="pop").logits
    (package / "decode.onnx").write_bytes(b"")
    assert torch.equal(model(ids).logits, expected), "the graph is the one that was checked"

    model = popcompile.load(other_package)
    shutil.move(other_package, other_package.with_name("old"))
    shutil.copytree(tiny_package, other_package)
    assert "was replaced or removed after it was loaded; load it again" in refusal(lambda: model(ids))
    assert model(ids, prefill="pop").logits.shape == first.shape


def test_a_tokenizer_of_another_package(package: Path, other_package: Path) -> None:
    model = popcompile.load(package)
    assert load_tokenizer(package, model.manifest).name_or_path == str(package)
    assert "was replaced while it was loaded" in refusal(lambda: load_tokenizer(other_package, model.manifest))


# --- --force ---------------------------------------------------------------------------------------------------


def in_out(out: Path, model: Path) -> list[object]:
    shutil.copytree(model, out / "model")
    return [out / "model", out]


def linked(out: Path, model: Path) -> list[object]:
    shutil.copytree(model, out / ".model")
    model = out.parent / "linked"
    model.symlink_to(out / ".model")
    return [model, out]


def files_linked(out: Path, model: Path) -> list[object]:
    folder = Path(shutil.copytree(model, out.parent / "linked"))
    (folder / "model.safetensors").rename(out / "weights")
    (folder / "model.safetensors").symlink_to(out / "weights")
    return [folder, out]


def adapter(out: Path, model: Path) -> list[object]:
    (out / "adapter").mkdir()
    return [model, out, "--adapter", out / "adapter"]


def calibration(out: Path, model: Path) -> list[object]:
    (out / "text.txt").write_text("text")
    return [model, out, "--calibration", out / "text.txt"]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (in_out, "is in it, and replacing it would remove that; give another folder"),
        (lambda out, model: [out, out, "--random-weights"], "MODEL"),
        (linked, "MODEL"),
        (files_linked, "MODEL"),
        (adapter, "--adapter"),
        (calibration, "--calibration"),
    ],
)
def test_what_is_read_is_not_replaced(
    place: Callable[[Path, Path], list[object]], words: str, cli: Cli, package: Path, model: Path
) -> None:
    arguments = place(package, model)
    line = cli.refuses("convert", *arguments, "--force", "--kv-projection", "layer")
    assert (words in line and "is in it" in line) or "--force would remove" in line


def test_relative_paths_are_seen_through(
    package: Path, cli: Cli, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint, package / ".model")
    monkeypatch.chdir(package)
    message = refusal(lambda: require_apart(Path("../out"), {"MODEL": ".model"}))
    assert message.startswith("../out: MODEL .model is in it")
    require_apart(Path("../out"), {"MODEL": "org/name", "--adapter": None})
    require_apart(Path(".model/out"), {"MODEL": ".model"})  # OUT in MODEL, which stays


def test_users_files_in_a_package(cli: Cli, package: Path, model: Path) -> None:
    for name in ("notes.txt", ".gitignore", "README.md", "passes/notes.txt"):
        (package / name).write_text("mine")
        line = cli.refuses("convert", model, package, "--force", "--prune", "1", "--kv-projection", "layer")
        assert f"--force would remove {name}, which is not the package's; move it away" in line
        (package / name).unlink()


def test_users_files_that_appear_meanwhile(package: Path) -> None:
    def convert() -> None:
        with staged(package, force=True):
            (package / "notes.txt").write_text("mine")

    before = snapshot(package)
    assert "--force would remove notes.txt" in refusal(convert)
    assert snapshot(package) == before | {"notes.txt": b"mine"}


def test_a_package_that_nobody_can_tell_from_other_files(cli: Cli, package: Path, model: Path) -> None:
    (package / MANIFEST).write_text("{")
    line = cli.refuses("convert", model, package, "--force", "--prune", "1")
    assert f"its {MANIFEST} does not say which files are the package's; remove the folder" in line
