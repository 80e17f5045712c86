"""Hostile places: what stands where a regular file is expected, and where output is to go."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz import adapters, checkpoints, ggufs, packages
from fuzz.case import Case, Workspace
from fuzz.hostile import damage
from fuzz.packages import PACKAGE, QUESTIONS, TEXT
from popcompile.package.manifest import MANIFEST


def make(rng: Random, workspace: Workspace) -> Case:
    choices: dict[Callable[..., Case], int] = {
        _package: 7, _checkpoint: 4, _adapter: 2, _gguf: 2, _whole: 3, _out: 3, _file: 3, _streams: 2,
    }  # fmt: skip
    return rng.choices(list(choices), list(choices.values()))[0](rng, workspace)


def spoil(rng: Random, workspace: Workspace, path: Path) -> tuple[str, str, bool]:
    """Put something else in place of a file: what it is, whether it still is the file ("same", "left" by a link out of
    its folder, or "other"), and whether only a user without privileges notices.
    """
    content = path.read_bytes()
    how = rng.choice(["fifo", "zero", "zero", "left", "left", "inside", "folder", "dangling", "loop", "empty",
                      "sparse", "socket",
                      "unreadable", "proc", "gone"])  # fmt: skip
    if how == "unreadable":
        path.chmod(0)
        return "is not readable", "other", True
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how == "zero":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/random", "/dev/stdin"]))
    elif how == "left":
        kept = workspace.outside / path.name
        kept.write_bytes(content)
        path.symlink_to(kept if rng.random() < 0.5 else os.path.relpath(kept, path.parent))
        return "is a link to a copy outside", "left", False
    elif how == "inside":
        (path.parent / "kept.bin").write_bytes(content)
        path.symlink_to("kept.bin")
        return "is a link to a copy beside it", "same", False
    elif how == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "empty":
        path.touch()
    elif how == "sparse":
        with path.open("wb") as file:
            file.write(content)
            file.truncate(rng.choice([len(content) + 1, 1 << 33, 100 << 30]))
        return f"has {path.stat().st_size} bytes, most of them a hole", "other", False
    elif how == "socket":
        here = os.getcwd()  # a socket's path is short
        os.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif how == "proc":
        path.symlink_to("/proc/self/mem")
    return f"is {how}", "other", False


def _package(rng: Random, workspace: Workspace) -> Case:
    package, base = packages.copy_base(rng, workspace)
    path = rng.choice(sorted(p for p in package.glob("*") if p.is_file()))
    words, what, unprivileged = spoil(rng, workspace, path)
    parts = packages.command(rng, *rng.choice([(), ("run", "load", "verify")]))
    expect = "refused" if what == "left" and parts[0] in ("run", "load", "verify") else "same"
    return packages.case(f"{path.name} {words}", parts, expect, base, unprivileged=unprivileged)


def _checkpoint(rng: Random, workspace: Workspace) -> Case:
    model, base = checkpoints.copy_model(rng, workspace)
    path = rng.choice(sorted(p for p in model.glob("*") if p.is_file()))
    words, _, unprivileged = spoil(rng, workspace, path)
    case = checkpoints.case(f"{path.name} {words}", checkpoints.command(rng), base)
    case.unprivileged = unprivileged
    return case


def _adapter(rng: Random, workspace: Workspace) -> Case:
    shutil.copytree(workspace.bases / "model", workspace.root / checkpoints.MODEL)
    adapter = Path(shutil.copytree(workspace.bases / "adapter", workspace.root / adapters.ADAPTER))
    path = adapter / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
    words, _, unprivileged = spoil(rng, workspace, path)
    parts = list(rng.choices(list(adapters.COMMANDS), list(adapters.COMMANDS.values()))[0])
    out = ["out"] if parts[0] == "convert" else []
    expect = "refused" if "99" in parts else "peft"
    return Case(f"{path.name} {words}", parts, expect, base="model", model="model", adapter="adapter", out=out,
                package="out" if out else None, unprivileged=unprivileged)  # fmt: skip


def _gguf(rng: Random, workspace: Workspace) -> Case:
    model = Path(shutil.copytree(workspace.bases / "gguf", workspace.root / "model"))
    words, _, unprivileged = spoil(rng, workspace, model / ggufs.FILE)
    parts = list(rng.choices(list(ggufs.COMMANDS), list(ggufs.COMMANDS.values()))[0])
    out = ["out"] if parts[0] == "convert" else []
    expect = "refused" if "99" in parts else "same"
    return Case(f"{ggufs.FILE} {words}", parts, expect, base="gguf", model="model", gguf=ggufs.FILE, out=out,
                package="out" if out else None, unprivileged=unprivileged)  # fmt: skip


def _odd(rng: Random, workspace: Workspace) -> str:
    """A path that names nothing of use."""
    (workspace.root / "file").write_text("x")
    (workspace.root / "empty").mkdir()
    os.mkfifo(workspace.root / "fifo")
    (workspace.root / "loop").symlink_to("loop")
    return rng.choice(["", " ", ".", "..", "/", "file", "file/x", "empty", "fifo", "loop", "/dev/zero", "/dev/null",
                       "/proc/self",
                       "nowhere", "a" * 300, "a" * 5000, "a/" * 3000, "a\x00b", "\udcff", "\ud800", "é" * 100, "~",
                       "~nobody",
                       "\x1b[2J", "a\nb", "-", "//", "empty/../nowhere", "outside"])  # fmt: skip


def _whole(rng: Random, workspace: Workspace) -> Case:
    """A path in place of the package, the model, the adapter."""
    odd = _odd(rng, workspace)
    kind = rng.choice(["package", "package", "model", "adapter", "gguf-file"])
    if kind == "package":
        parts = packages.command(rng)
        parts[1] = odd
        return Case(f"PACKAGE is {ascii(odd)[:70]}", parts, "refused", stdin=QUESTIONS)
    shutil.copytree(workspace.bases / "model", workspace.root / "model")
    if kind == "model":
        return Case(f"MODEL is {ascii(odd)[:70]}", ["convert", odd, "out"], "refused")
    if kind == "adapter":
        return Case(f"--adapter is {ascii(odd)[:70]}", ["convert", "model", "out", "--adapter", odd], "refused")
    return Case(f"--gguf-file is {ascii(odd)[:70]}", ["convert", "model", "out", "--gguf-file", odd], "refused")


def _out(rng: Random, workspace: Workspace) -> Case:
    """Where a package is to go: nothing that is there is lost."""
    root, force = workspace.root, rng.choice([[], ["--force"], ["--force"]])
    shutil.copytree(workspace.bases / "model", root / "model")
    shutil.copytree(workspace.bases / "split", root / "pkg")
    options = ["--random-weights", "--prune", "1"]
    how = rng.randrange(9)
    if how < 3:
        odd = _odd(rng, workspace)
        case = Case(f"OUT is {ascii(odd)[:70]}", ["convert", "model", odd, *options, *force], "any")
        case.out = [odd] if odd in ("nowhere", "empty", "é" * 100, "~", "~nobody", "\x1b[2J", "a\nb", "-",
        "empty/../nowhere",
                                    "a" * 300, " ", "\udcff", "\ud800") else []  # fmt: skip
        case.out = ["nowhere"] if odd == "empty/../nowhere" else case.out
        if odd in (".", "..", "/", "file", "file/x", "fifo", "loop", "outside") or not case.out:
            case.expect = "refused"
        return case
    if how == 3:
        words, model, out = "OUT is MODEL", "model", rng.choice(["model", "./model", "model/", "model/../model"])
    elif how == 4:
        shutil.copytree(root / "model", root / "pkg" / "model")
        words, model, out = "OUT holds MODEL", "pkg/model", "pkg"
    elif how == 5:
        (root / "pkg" / rng.choice(["notes.txt", ".hidden", "passes/mine.txt", "sub/x"])).parent.mkdir(exist_ok=True)
        name = rng.choice(["notes.txt", ".hidden", "passes/mine.txt"])
        (root / "pkg" / name).write_text("mine")
        words, model, out = f"OUT holds {name}, which no manifest lists", "model", "pkg"
    elif how == 6:
        words, model, out = "OUT is in MODEL", "model", rng.choice(["model/out", "model/tokenizer.json"])
        if out == "model/out":
            return Case(words, ["convert", model, out, *options], "any", out=["model"])
    elif how == 7:
        data, words, _ = damage(json.loads((root / "pkg" / MANIFEST).read_bytes()), rng, focus=[("files",)])
        packages.sign(root / "pkg", data, describe=False)
        return Case(
            f"OUT has a damaged manifest: {words}", ["convert", "model", "pkg", *options, "--force"], "any", out=["pkg"]
        )
    else:
        (root / "linked").symlink_to(rng.choice(["pkg", "outside", "nowhere", "model"]))
        words, model, out = "OUT is a link", "model", "linked"
    return Case(words, ["convert", model, out, *options, *force], "refused")


def _file(rng: Random, workspace: Workspace) -> Case:
    """Files that options name: read, or written."""
    packages_kind = rng.random() < 0.5
    text = workspace.root / "text.txt"
    text.write_text(TEXT)
    words, odd = "", ""
    spoiled = rng.random() < 0.5
    if spoiled:
        what, _, unprivileged = spoil(rng, workspace, text)
        words, odd = f"the file {what}", "text.txt"
    else:
        odd, unprivileged = _odd(rng, workspace), False
        words = f"the file is {ascii(odd)[:70]}"
    shutil.copytree(workspace.bases / "split", workspace.root / PACKAGE)
    shutil.copytree(workspace.bases / "model", workspace.root / "model")
    if packages_kind:
        option, parts = rng.choice([
            ("--prompt-file", ["run", PACKAGE, "--max-new-tokens", "3", "--raw"]),
            ("--text", ["evaluate", PACKAGE, "--prompts", "1", "--prompt-tokens", "20", "--continuation-tokens", "2",
                        "--greedy-prompts", "0"]),
            ("--html", ["inspect", PACKAGE]),
        ])  # fmt: skip
    else:
        option, parts = rng.choice([
            ("--text", ["analyze", "model", *checkpoints.ANALYZE]),
            ("--calibration", ["convert", "model", "out", "--calibration-texts", "2", "--prune", "1",
            "--refinement-steps", "0"]),
            ("--plot", ["analyze", "model", *checkpoints.ANALYZE]),
        ])  # fmt: skip
    out = ["out"] if parts[0] == "convert" else [odd] if option in ("--html", "--plot") else []
    if option == "--plot":
        out = []
        odd = odd if rng.random() < 0.3 else f"{odd}.svg"
        out = [odd]
    if spoiled and out == [odd]:
        out += [f"outside/{odd}", "kept.bin", "nowhere"]  # an output that is a link is written where it leads
    return Case(f"{option}: {words}", [*parts, option, odd], "any", out=out, unprivileged=unprivileged)


def _streams(rng: Random, workspace: Workspace) -> Case:
    """stdin, stdout and stderr that fail."""
    package, base = packages.copy_base(rng, workspace)
    if rng.random() < 0.3:
        (package / MANIFEST).write_text("{}")
    case = packages.case("", packages.command(rng, "verify", "inspect", "run"), "same", base)
    which = rng.choice(["stdout", "stderr", "stdin"])
    how = rng.choice(["closed", "/dev/full"]) if which != "stdin" else rng.choice(["closed", "\x00"])
    if which == "stdin":
        case.stdin = how if how == "closed" else "\ud800\udcff\x00\n"
    else:
        setattr(case, which, how)
    case.words = f"{which} is {how!r}"
    return case
