"""Bad input: one line on stderr that says what is wrong and how to mend it, exit status 2, nothing changed on disk."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from popcompile.cli import _parser, main
from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.package import MANIFEST, REPORT, WEIGHTS, check_files, describe_files, read_manifest

#: every command that takes a package, with the rest of its arguments
COMMANDS = {"inspect": [], "inspect --json": ["--json"], "verify": [], "run": ["--prompt", "the cat"]}

linux = pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces, forkserver and /dev/full are Linux's")


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Every file below a folder with its content."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


class Cli:
    """popcompile's command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capsys, self._folder = capsys, folder

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self._capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
        return status, *self._capsys.readouterr()

    def refuses(self, *arguments: object) -> str:
        """The one line that the user sees."""
        before = snapshot(self._folder)
        status, out, line = self.run(*arguments)
        assert_one_line(status, out, line)
        assert snapshot(self._folder) == before
        return line


def assert_one_line(status: int, out: str, err: str) -> None:
    assert (status, out) == (2, ""), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("popcompile") and "error: " in err and "internal" not in err, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return Cli(capsys, tmp_path)


def popcompile(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """popcompile in a process of its own."""
    command = [sys.executable, "-m", "popcompile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# --- models and packages ---------------------------------------------------------------------------------------


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A two-layer Llama of random weights with a tokenizer of a few words."""
    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat", *(f"w{i}" for i in range(122))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pristine_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pristine(pristine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package, made as a user does; nothing else is printed or left."""
    parent = tmp_path_factory.mktemp("packages")
    done = popcompile("convert", pristine_model, parent / "out", "--prune", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{parent / 'out'}: 2 layers, prefill skips 1 (1)") and done.stdout.count("\n") == 1
    assert [path.name for path in parent.iterdir()] == ["out"]
    return parent / "out"


@pytest.fixture(scope="module")
def other_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with files of the same names and sizes: other weights, another epsilon in its norms."""
    parent = tmp_path_factory.mktemp("others")
    convert(save_model(parent / "model", seed=1, rms_norm_eps=1e-5), parent / "out", prune=1)
    return parent / "out"


@pytest.fixture
def model(pristine_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_model, tmp_path / "model"))


@pytest.fixture
def package(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def sign(package: Path, **changes: Any) -> None:
    """Make the manifest fit the package's files again."""
    manifest = read_manifest(package)
    (package / MANIFEST).unlink()
    manifest = dataclasses.replace(manifest, files=describe_files(package), **changes)
    (package / MANIFEST).write_text(manifest.to_json())


# --- arguments -------------------------------------------------------------------------------------------------


def test_wrong_commands(cli: Cli) -> None:
    assert "arguments are required: COMMAND (see popcompile --help)" in cli.refuses()
    assert "invalid choice: 'compile' (choose from" in cli.refuses("compile")
    assert "unrecognized arguments: --colour" in cli.refuses("inspect", "out", "--colour")
    assert "unrecognized arguments: a b" in cli.refuses("inspect", "out", "a\nb")
    assert "required: OUT (see popcompile convert --help)" in cli.refuses("convert", "model")
    assert "required: OUT (see popcompile inspect --help)" in cli.refuses("inspect")
    assert "expected one argument" in cli.refuses("convert", "model", "out", "--prune")
    for count in ("0", "-1", "1.5", "many", "9" * 30):
        assert (
            "is not a number of at least 1"
            in cli.refuses("run", "out", "--prompt", "x", "--max-new-tokens", count)[-99:]
        )
    for heat in ("0", "-1", "nan", "hot"):
        assert "not a number between 0 and 100" in cli.refuses("run", "out", "--prompt", "x", "--temperature", heat)


def test_help_of_every_command(cli: Cli) -> None:
    status, out, err = cli.run("--help")
    assert (status, err) == (0, "")
    (commands,) = [a.choices for a in _parser()._actions if isinstance(a.choices, dict)]
    assert set(commands) >= {"convert", "inspect", "run", "verify"}
    for name in commands:
        assert name in out
        status, text, err = cli.run(name, "--help")
        assert (status, err) == (0, "") and f"example: popcompile {name}" in text


def test_a_process_ends_as_main_says() -> None:
    done = popcompile()
    assert_one_line(done.returncode, done.stdout, done.stderr)
    done = popcompile("convert", "--help")
    assert (done.returncode, done.stderr) == (0, "") and "example: popcompile convert" in done.stdout


CHOICES = [
    (["--dtype", "fp64"], "--dtype fp64: unknown; choose one of fp32, fp16"),
    (["--dtype", ""], "--dtype : unknown; choose one of"),
    (["--provider", "tpu"], "--provider tpu: unknown; choose one of cpu, cuda"),
    (["--layout", "merged"], "--layout merged: unknown; choose one of split"),
    (["--kv-projection", "none"], "--kv-projection none: unknown; choose one of calibrated, layer"),
    (["--prune", "2"], "the model has 2 layers and at least one must encode the prompt; prune at most 1"),
    (["--prune", "999999999"], "prune at most 1"),
    (["--prune", "0.9"], "prune at most 1"),
    (["--prune", "-1"], "out of range; give a count from 0 to 1, or a fraction from 0 to below 1"),
    (["--prune", "1.5"], "out of range; give a count"),
    (["--prune", "3/2"], "out of range; give a count"),
    (["--prune=-1/2"], "out of range; give a count"),
    *((["--prune", text], "neither a count nor a fraction nor auto; for example --prune 10 or --prune 1/3") for text in
      ("abc", "1/0", "", "nan", "inf", "1e999999999", "9" * 30, "1/", "50%")),
    (["--layers", "2"], "there is no layer 2; the model has 0 to 1"),
    (["--layers", "0-999999"], "there is no layer 999999; the model has 0 to 1"),
    (["--layers", "1-0"], "the range 1-0 runs backwards; for example --layers 20-29"),
    *((["--layers", text], "is neither a layer nor a range; for example --layers 20-29") for text in
      ("a", "1-", "-1", "", ",", "0,,1", "0,", "0-1-1", "0x1", "1.0", "9999999", "all")),
    (["--layers", "0-1"], "at least one of the 2 layers must encode the prompt; prune fewer"),
    (["--layers", "1,0"], "prune fewer"),
    (["--layers", "1", "--prune", "1"], "--prune and --layers are both given"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), CHOICES, ids=[" ".join(o)[:30] for o, _ in CHOICES])
def test_wrong_choices(options: list[str], words: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    assert words in cli.refuses("convert", model, tmp_path / "new", *options)


# --- models ----------------------------------------------------------------------------------------------------


def test_unknown_model(cli: Cli, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = popcompile("convert", "nobody/no-such-model", tmp_path / "out", env=environment)
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert "nobody/no-such-model: no such folder or file, and not in the local Hugging Face cache" in done.stderr
    assert "give a local folder, a .gguf file, or a cached hub id" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert "no config.json; give the folder of a" in cli.refuses("convert", tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("kind", ["t5", "mamba", "vit", "bert", "rwkv"])
def test_not_a_decoder(kind: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"]}))
    for options in ([], ["--random-weights"]):
        line = cli.refuses("convert", tmp_path, tmp_path / "out", *options)
        assert f"(model type {kind})" in line and "popcompile supports decoder-only causal LMs" in line


def test_broken_gguf(cli: Cli, tmp_path: Path) -> None:
    for content, words in {
        b"": "is not a GGUF file; give a .gguf file or a model's folder",
        b"PK\3\4" * 9: "is not a GGUF file",
        b"GGUF\3\0\0\0": "the GGUF header is truncated or corrupt; download it again",
        b"GGUF" + b"\xff" * 500: "download it again",
    }.items():
        (tmp_path / "x.gguf").write_bytes(content)
        assert words in cli.refuses("convert", tmp_path / "x.gguf", tmp_path / "out")


def change_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(model / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), model / "model.safetensors")


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return change


UP = "model.layers.1.mlp.up_proj.weight"
TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor | None], list[str], str]] = {
    "missing": (lambda t: None, [], f"has no tensor {UP}; its config describes another model"),
    "shape": (lambda t: t[:, 1:].clone(), [], f"tensor {UP} has shape [64, 31], its config asks for [64, 32]"),
    "integers": (lambda t: t.to(torch.int8), [], f"tensor {UP} holds int8; give an unquantized checkpoint"),
    "NaN": (fill(float("nan")), [], f"tensor {UP} holds NaN or infinity; mend the checkpoint"),
    "fp16 overflow": (fill(1e5), ["--dtype", "fp16"], f"tensor {UP} has values beyond the range of float16; mend"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(case: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    change, options, words = TENSORS[case]
    change_tensor(model, UP, change)
    assert words in cli.refuses("convert", model, tmp_path / "out", "--prune", "1", *options)


# --- where the package goes ------------------------------------------------------------------------------------


def test_places_that_are_taken(cli: Cli, model: Path, package: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").touch()
    assert "exists already; give another folder, or --force to replace it" in cli.refuses("convert", model, package)
    assert "exists already" in cli.refuses("convert", model, tmp_path / "work")
    assert "--force replaces packages only" in cli.refuses("convert", model, tmp_path / "work", "--force")
    assert "--force replaces packages only" in cli.refuses("convert", model, model, "--force")
    notes = tmp_path / "work" / "notes.txt"
    assert "exists already" in cli.refuses("convert", model, notes)
    assert "is no folder, and --force replaces" in cli.refuses("convert", model, notes, "--force")
    assert "there is no folder" in cli.refuses("convert", model, tmp_path / "a" / "b")
    assert "create it first" in cli.refuses("convert", model, notes / "out")
    assert "File name too long" in cli.refuses("convert", model, tmp_path / ("x" * 300))


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a conversion's process meets.

    disk: (folder, mount options) of a fresh tmpfs that only this process sees.
    file_size: RLIMIT_FSIZE in bytes. user: uid to become.
    """

    disk: tuple[Path, str] | None = None
    file_size: int | None = None
    user: int | None = None


def _child(arguments: list[str], surroundings: Surroundings, log: Path) -> None:
    """Runs in a process of its own: the command line, its output and the disk's files into `log`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(log / name, os.O_CREAT | os.O_WRONLY, 0o644), number)
    if surroundings.disk:
        mount_tmpfs(*surroundings.disk)
    if surroundings.file_size:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (surroundings.file_size, surroundings.file_size))
    if surroundings.user is not None:
        os.setuid(surroundings.user)
    status = main(arguments)
    if surroundings.disk:
        (log / "files").write_text("\n".join(snapshot(surroundings.disk[0])))
    sys.exit(status)


def mount_tmpfs(folder: Path, options: str) -> None:
    """Needs root, or a system that lets everyone have a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, read_only = 0x20000, 0x10000000, (1 << 18) | (1 << 14), 1
    user, group, root = os.geteuid(), os.getegid(), os.geteuid() == 0

    def check(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(new_mounts if root else new_mounts | new_user))
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    check(libc.mount(None, b"/", None, private, None))
    flags = read_only if options == "ro" else 0
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, None if flags else options.encode()))


def _probe(folder: Path) -> None:
    mount_tmpfs(folder, "size=64k")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start with everything imported, as copies of one that did nothing else."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["popcompile.conversion", "transformers.models.llama.modeling_llama", "onnxscript", "torch._dynamo"]
    )
    return context


@pytest.fixture
def disk(processes: Any, tmp_path: Path) -> Path:
    """A folder to mount a disk at."""
    probe = processes.Process(target=_probe, args=(tmp_path,))
    probe.start()
    probe.join()
    if probe.exitcode:
        pytest.skip("this system lets this user mount nothing, not even in a user namespace")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def convert_in(processes: Any, log: Path, surroundings: Surroundings, *arguments: object) -> tuple[str, list[str]]:
    """The line that a refused conversion prints, and what it leaves on the disk."""
    log.mkdir()
    log.chmod(0o777)
    process = processes.Process(target=_child, args=([*map(str, ("convert", *arguments))], surroundings, log))
    process.start()
    process.join()
    line = (log / "stderr").read_text()
    assert_one_line(process.exitcode, (log / "stdout").read_text(), line)
    return line, (log / "files").read_text().split() if (log / "files").exists() else []


@linux
def test_read_only_disk(processes: Any, disk: Path, pristine_model: Path, tmp_path: Path) -> None:
    surroundings = Surroundings(disk=(disk, "ro"))
    line, files = convert_in(processes, tmp_path / "log", surroundings, pristine_model, disk / "out")
    assert "no permission to write in" in line or "Read-only file system" in line
    assert "choose another place" in line and files == []


@linux
def test_mount_point(processes: Any, disk: Path, pristine_model: Path, tmp_path: Path) -> None:
    """A volume mounted at OUT, as containers have it, cannot be renamed."""
    surroundings = Surroundings(disk=(disk, "size=1m"))
    line, files = convert_in(processes, tmp_path / "log", surroundings, pristine_model, disk, "--force")
    assert "is a mount point, which no folder can replace; give a folder in it" in line and files == []
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "log"}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can look into, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@linux
def test_folder_of_another_user(processes: Any, open_folder: Path, pristine_model: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine_model, open_folder / "model")
    with contextlib.ExitStack() as stack:
        surroundings = Surroundings(user=65534)
        if os.geteuid() != 0:
            open_folder.chmod(0o555)
            stack.callback(open_folder.chmod, 0o755)
            surroundings = Surroundings()
        line, _ = convert_in(
            processes,
            open_folder.parent / f"{open_folder.name}-log",
            surroundings,
            open_folder / "model",
            open_folder / "out",
        )
    shutil.rmtree(open_folder.parent / f"{open_folder.name}-log")
    assert f"no permission to write in {open_folder}; choose another place" in line
    assert [path.name for path in open_folder.iterdir()] == ["model"]


def kilobytes(package: Path, *patterns: str) -> int:
    """What files take on a tmpfs."""
    paths = [path for pattern in patterns for path in package.glob(pattern)]
    return sum(-(-path.stat().st_size // 4096) * 4 for path in paths)


#: what fits on the disk, and how much less (KB); what the line says
FULL = {
    "known before any work": ((WEIGHTS,), 64, "the weights need 0.1 MB and"),
    "in the graphs as text": ((WEIGHTS,), -16, "the disk is full; free some space"),
    "in the tokenizer": ((WEIGHTS, "passes/*", "*.onnx", "*on_config.json", "config.json"), 0, "the disk is full"),
}  # fmt: skip


@linux
@pytest.mark.parametrize("moment", FULL)
def test_disk_full(
    moment: str, processes: Any, disk: Path, pristine_model: Path, pristine: Path, tmp_path: Path
) -> None:
    patterns, less, words = FULL[moment]
    surroundings = Surroundings(disk=(disk, f"size={kilobytes(pristine, *patterns) - less}k"))
    line, files = convert_in(processes, tmp_path / "log", surroundings, pristine_model, disk / "out", "--prune", "1")
    assert words in line and "free some space" in line
    assert files == []


@linux
def test_file_size_limit(processes: Any, pristine_model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    surroundings = Surroundings(file_size=100_000)  # the weights are larger
    line, _ = convert_in(processes, tmp_path / "log", surroundings, pristine_model, tmp_path / "disk" / "out")
    assert "a file gets larger than this process or disk allows; raise the limit (ulimit -f)" in line
    assert list((tmp_path / "disk").iterdir()) == []


# --- conversions that are killed -------------------------------------------------------------------------------

Moment = Callable[[Path, Path], bool]


def _replaced(out: Path) -> Moment:
    before = out.stat().st_ino
    return lambda _, out: out.exists() and out.stat().st_ino != before


#: moment(hidden folder, OUT)
MOMENTS: dict[str, Moment] = {
    "the hidden folder appears": lambda hidden, _: hidden.exists(),
    "passes are written": lambda hidden, _: (hidden / "passes").exists() and len(os.listdir(hidden / "passes")) > 5,
    "weights are written": lambda hidden, _: (hidden / WEIGHTS).exists(),
    "the manifest is written": lambda hidden, _: (hidden / MANIFEST).exists(),
}


def killed(processes: Any, log: Path, moment: Moment, *arguments: object) -> str:
    """Convert, and kill it when `moment` has come; the name of its hidden folder."""
    log.mkdir(exist_ok=True)
    out = Path(str(arguments[1]))
    process = processes.Process(target=_child, args=([*map(str, ("convert", *arguments))], Surroundings(), log))
    process.start()
    hidden = out.with_name(f".{out.name}.partial-{process.pid}")
    deadline = time.monotonic() + 60
    while not moment(hidden, out):
        assert process.is_alive() and time.monotonic() < deadline, (log / "stderr").read_text()
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return hidden.name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@linux
def test_killed_conversions(processes: Any, pristine_model: Path, pristine: Path, tmp_path: Path) -> None:
    """One after another, so that each also removes what the one before it left."""
    parent, log = tmp_path / "parent", tmp_path / "log"
    parent.mkdir()
    out = parent / "out"
    hidden = killed(
        processes, log, lambda hidden, _: (hidden / "decode.onnx").exists(), pristine_model, out, "--prune", "1"
    )
    assert names(parent) == {hidden}, "no half package under OUT's name"
    shutil.copytree(pristine, out)
    before = snapshot(out)
    for name, moment in MOMENTS.items():
        hidden = killed(processes, log, moment, pristine_model, out, "--force", "--prune", "0")
        assert names(parent) == {"out", hidden}, name
        assert snapshot(out) == before, name
        check_files(out, read_manifest(out), full=True)
    replaced = killed(processes, log, _replaced(out), pristine_model, out, "--force", "--prune", "0")
    assert names(parent) <= {"out", replaced}  # the rename was done: the new package, whole
    check_files(out, read_manifest(out), full=True)
    assert read_manifest(out).pruned == []


def test_interrupted_conversion(model: Path, tmp_path: Path) -> None:
    """Ctrl-C, in the middle."""

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "compile" and done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", prune=1, progress=interrupt)
    assert names(tmp_path) == {"model"}


# --- damaged packages ------------------------------------------------------------------------------------------


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
    "newer": (lambda p: edit_manifest(p, format_version=99), "format version 99 is newer than this popcompile reads"),
    "unknown field": (lambda p: edit_manifest(p, flavour=1), "has an unknown field flavour; convert the model again"),
    "missing field": (drop_field, "has no field pruned; convert the model again"),
    "wrong field": (lambda p: edit_manifest(p, pruned="1"), "field pruned has a wrong value; convert the model again"),
    "edited": (lambda p: edit_manifest(p, pruned=[0]), "was changed after the package was made; convert the model"),
    "name outside": (lambda p: name_outside(p, "../x"), "names '../x', which is outside the package; do not use it"),
    "absolute name": (lambda p: name_outside(p, "/etc/passwd"), "names '/etc/passwd', which is outside the package"),
    "data outside": (lambda p: point_outside(p, "../x.data"), "from ../x.data and not from the package's"),
    "data elsewhere": (lambda p: point_outside(p, "/etc/passwd"), "from /etc/passwd and not from the package's"),
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
    assert "cannot be read (File name too long)" in line(tmp_path / ("x" * 300))


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


# --- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_options(cli: Cli, package: Path) -> None:
    for name in ("NoSuch", "", "*"):
        line = cli.refuses("inspect", package, "--pass", name)
        assert "no such pass; the passes are " in line and "PrunePrefill" in line
    for name in ("PrunePrefill", ""):
        assert "give one of them" in cli.refuses("inspect", package, "--json", "--pass", name)
    status, out, err = cli.run("inspect", package, "--pass", "pruneprefill")
    assert (status, err) == (0, "") and "# prefill after PrunePrefill" in out


def test_json_is_one_document(pristine: Path) -> None:
    done = popcompile("inspect", pristine, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert set(document) == {"manifest", "report", "not_measured"} and document["manifest"]["pruned"] == [1]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
@pytest.mark.parametrize(
    ("arguments", "into", "status", "words"),
    [
        (["inspect", "OUT"], "| head -1", 0, ""),
        (["inspect", "OUT", "--json"], "| true", 0, ""),
        (["--help"], "| true", 0, ""),
        (["inspect", "OUT"], ">&-", 0, ""),
        pytest.param(["inspect", "OUT", "--json"], "> /dev/full", 2, "the disk is full", marks=linux),
    ],
)
def test_output_that_nobody_reads(arguments: list[str], into: str, status: int, words: str, pristine: Path) -> None:
    """A closed pipe ends quietly; a full disk is said in one line."""
    command = " ".join([sys.executable, "-m", "popcompile", *arguments]).replace("OUT", f"'{pristine}'")
    script = f"set -o pipefail; {command} {into}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert words in done.stderr and done.stderr.count("\n") == (1 if words else 0)


def test_a_path_that_no_terminal_can_show(package: Path) -> None:
    odd = os.fsencode(package.parent) + b"/\xff\xfe"
    try:
        os.rename(package, odd)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    command = [sys.executable, "-m", "popcompile", "inspect", odd]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"") and rb"\udcff\udcfe" in done.stdout
