"""Damaged packages whose hashes are right: what a package's maker could have written, and what no manifest lists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.case import AUTO_MAP, Case, Workspace
from fuzz.hostile import VALUES, damage, damage_bytes, damage_text, dumps, flip, short
from popcompile.package.manifest import MANIFEST, _checksum, describe_files

PACKAGE = "pkg"
#: how often each command is taken; "load" is popcompile.load and a call
COMMANDS: dict[tuple[str, ...], int] = {
    ("verify", PACKAGE): 3,
    ("verify", PACKAGE, "--json"): 1,
    ("inspect", PACKAGE): 3,
    ("inspect", PACKAGE, "--json"): 1,
    ("inspect", PACKAGE, "--html", "report.html"): 2,
    ("inspect", PACKAGE, "--pass", "LowerAttention"): 1,
    ("run", PACKAGE, "--prompt", "the cat", "--max-new-tokens", "4"): 3,
    ("run", PACKAGE, "--prompt", "the cat", "--max-new-tokens", "4", "--prefill", "full"): 1,
    ("run", PACKAGE, "--chat", "--max-new-tokens", "3"): 1,
    ("evaluate", PACKAGE, "--text", "text.txt", "--prompts", "1", "--prompt-tokens", "20", "--continuation-tokens", "2",
     "--greedy-prompts", "0", "--json"): 1,
    ("load", PACKAGE): 4,
}  # fmt: skip
QUESTIONS = "the cat\ny\n"
TEXT = "the cat sat w1 w2 w3 w4 " * 40


def command(rng: Random, *kinds: str) -> list[str]:
    """A command on a package, of some kinds or any."""
    chosen = {parts: weight for parts, weight in COMMANDS.items() if not kinds or parts[0] in kinds}
    return list(rng.choices(list(chosen), list(chosen.values()))[0])


def case(words: str, parts: list[str], expect: str, base: str, **options: Any) -> Case:
    """A case on a package; --chat reads a question and a yes, --html writes a page."""
    stdin = QUESTIONS if "--chat" in parts else "y\n"
    out = ["report.html"] if "--html" in parts else []
    return Case(words, parts, expect, package=PACKAGE, base=base, out=out, stdin=stdin, **options)


def copy_base(rng: Random, workspace: Workspace) -> tuple[Path, str]:
    """A package to damage, and which one it is a copy of."""
    known = [base for base in ("split", "unified", "int4") if (workspace.bases / base).is_dir()]
    base = rng.choices(known, [6, 2, 2][: len(known)])[0]
    shutil.copytree(workspace.bases / base, workspace.root / PACKAGE)
    (workspace.root / "text.txt").write_text(TEXT)
    return workspace.root / PACKAGE, base


def sign(package: Path, manifest: dict[str, Any] | None = None, *, describe: bool = True) -> None:
    """Make the manifest fit: sizes and hashes of the files (unless `describe` is false) and its own checksum."""
    path = package / MANIFEST
    data: Any = json.loads(path.read_bytes()) if manifest is None else manifest
    if isinstance(data, dict):
        data.pop("manifest_sha256", None)
        if describe:
            path.unlink(missing_ok=True)
            data["files"] = describe_files(package, data["weights"])
        data["manifest_sha256"] = _checksum(data)
    path.write_bytes(dumps(data))


# --- mutations ---------------------------------------------------------------------------------------------------


def make(rng: Random, workspace: Workspace) -> Case:
    package, base = copy_base(rng, workspace)
    choices: dict[Callable[..., Case], int] = {
        _manifest: 6, _files_table: 3, _manifest_text: 1, _json: 7, _text: 2, _weights: 2, _unlisted: 2,
        _listed_part: 1,
        _foreign: 2,
    }  # fmt: skip
    return rng.choices(list(choices), list(choices.values()))[0](rng, workspace, package, base)


def _manifest(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """A field of the manifest, signed."""
    data = json.loads((package / MANIFEST).read_bytes())
    fields = [(key,) for key in data if key not in ("files", "manifest_sha256", "versions", "source", "popcompile")]
    damaged, words, _ = damage(data, rng, focus=fields)
    sign(package, damaged, describe=False)
    return case(f"{MANIFEST}, signed: {words}", command(rng), "logits", base)


def _files_table(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """An entry of the manifest's table of files, signed."""
    data = json.loads((package / MANIFEST).read_bytes())
    names = sorted(data["files"])
    name, value = rng.choice([*names, data["weights"]]), rng.choice(VALUES)
    how = rng.randrange(4)
    if how == 0:
        key = rng.choice(["size", "sha256", "sample_sha256", "x"])
        data["files"][name][key] = value
        words = f"files.{name}.{key} = {short(value)}"
    elif how == 1:
        data["files"][name] = value
        words = f"files.{name} = {short(value)}"
    elif how == 2:
        odd = rng.choice(["", ".", "..", "../outside/secret", "/dev/zero", "/etc/passwd", "a\x00b", "\x1b[2J",
                          "a" * 5000,
                          "C:\\x", "\ud800", MANIFEST, "passes", "x/../../y", "/".join("a" * 300)])  # fmt: skip
        data["files"][odd] = data["files"][name]
        words = f"files has {short(odd)} as well"
    else:
        odd = rng.choice(["../outside/secret", "/dev/zero", "pkg", ".", "a\x00b", "\x1b[2J", "a" * 5000, "config.json"])
        where = rng.choice(["weights", *data["graphs"]])
        if where == "weights":
            data["weights"] = odd
        else:
            data["graphs"][where] = odd
        data["files"][odd] = data["files"][name]
        words = f"the file of {where} is {short(odd)}, listed"
    sign(package, data, describe=False)
    return case(f"{MANIFEST}, signed: {words}", command(rng), "logits", base)


def _manifest_text(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    path = package / MANIFEST
    content, words = damage_text(path.read_bytes(), rng)
    path.write_bytes(content)
    return case(f"{MANIFEST}: {words}", command(rng), "same", base)


def _json(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """A value in one of the JSON files, signed."""
    name = rng.choice(
        ["config.json"] * 3 + ["generation_config.json"] * 2 + ["tokenizer.json", "tokenizer_config.json"] * 2
        + ["genai_config.json"] + ["report.json"] * 3
    )  # fmt: skip
    path = package / name
    damaged, words, _ = damage(json.loads(path.read_bytes()), rng)
    path.write_bytes(dumps(damaged))
    sign(package)
    kinds = ("inspect",) if name == "report.json" else ("run", "load") if rng.random() < 0.8 else ()
    expect = "same" if name in ("report.json", "genai_config.json") else "logits"
    return case(f"{name}, signed: {words}", command(rng, *kinds), expect, base)


def _text(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """The bytes of one of the text files, signed."""
    path = rng.choice(sorted(p for p in package.rglob("*") if p.suffix in (".json", ".txt") and p.name != MANIFEST))
    content, words = damage_text(path.read_bytes(), rng)
    path.write_bytes(content)
    sign(package)
    return case(f"{path.relative_to(package)}, signed: {words}", command(rng), "logits", base)


def _weights(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """The bytes of the weights, signed: another model, or one that does not fit."""
    path = package / json.loads((package / MANIFEST).read_bytes())["weights"]
    content, words = (damage_bytes if rng.random() < 0.6 else flip)(path.read_bytes(), rng)
    path.write_bytes(content)
    sign(package)
    return case(f"{path.name}, signed: {words}", command(rng, "run", "load", "verify"), "any", base)


def _unlisted(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """A file that no manifest lists and that loading might read."""
    files = {
        "chat_template.jinja": b"{{ raise_exception('the foreign template') }}",
        "additional_chat_templates/x.jinja": b"hello",
        "added_tokens.json": b'{"<new>": 3}',
        "special_tokens_map.json": b'{"eos_token": "cat"}',
        "tokenizer.model": b"\x00" * 40,
        "vocab.json": b'{"the": 0, "cat": 1}',
        "merges.txt": b"#version: 0.2\nc a\n",
        "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "../outside"}',
        "processor_config.json": b'{"processor_class": "X"}',
        "preprocessor_config.json": b'{"processor_class": "X"}',
        "tokenizer_config.1.0.0.json": b'{"tokenizer_class": "X"}',
        "custom_generate/generate.py": b"raise SystemExit(9)",
    }
    name = rng.choice(list(files))
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_bytes(files[name])
    parts = command(rng, *(("run", "load") if rng.random() < 0.7 else ()))
    return case(f"{name} is there, unlisted", parts, "same", base)


def _listed_part(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """A manifest that does not list what loading reads, which is then changed."""
    data = json.loads((package / MANIFEST).read_bytes())
    path = package / rng.choice(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
    del data["files"][path.name]
    sign(package, data, describe=False)
    if rng.random() < 0.3:
        path.unlink()
        return case(f"{path.name} is gone and not listed", command(rng), "logits", base)
    content = json.loads(path.read_bytes()) | {"eos_token_id": [3, 4, 5], "eos_token": "cat", "note": "changed"}
    path.write_bytes(dumps(content))
    return case(f"{path.name} is changed and not listed", command(rng, "run", "load", "verify"), "refused", base)


def _foreign(rng: Random, workspace: Workspace, package: Path, base: str) -> Case:
    """Code in the package, all of it listed."""
    workspace.trap(package / "trap.py")
    name = rng.choice(["config.json", "tokenizer_config.json", "generation_config.json"])
    content = json.loads((package / name).read_bytes())
    changes: dict[str, Any] = {"auto_map": AUTO_MAP}
    if rng.random() < 0.5:
        changes |= {"model_type": "unheard", "architectures": ["Model"], "tokenizer_class": "Tokenizer"}
    if rng.random() < 0.3:
        changes |= {"custom_generate": ".", "trust_remote_code": True}
        (package / "custom_generate").mkdir()
        workspace.trap(package / "custom_generate" / "generate.py")
    if rng.random() < 0.3:
        changes["auto_map"] = {
            k: (f"{workspace.outside}--{v}" if isinstance(v, str) else v) for k, v in AUTO_MAP.items()
        }
        workspace.trap(workspace.outside / "trap.py")
    (package / name).write_bytes(dumps(content | changes))
    sign(package)
    words = f"{name}, signed: {', '.join(changes)} and a trap.py"
    return case(words, command(rng, "run", "load"), "logits", base)
