"""Run a unified package in every client of text: python examples/clients/check.py PACKAGE [--genai-include DIR]

Installs each from its registry into an environment of its own, kept in WORK, runs it on the same prompts, and compares
its greedy tokens with popcompile's. The C++ client is compiled where --genai-include names the folder with ort_genai.h
(src/ of onnxruntime-genai's repository); its library is the installed Python package's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import AutoTokenizer

import popcompile

HERE = Path(__file__).parent
#: shorter than the window, and longer
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ", (HERE.parents[1] / "README.md").read_text()[:1200]]
NEW_TOKENS = 24
#: this range of torch keeps pip from fetching a CUDA build that nothing here needs
OPTIMUM = ["optimum-onnx[onnxruntime]>=0.1,<0.2", "torch>=2.11,<2.14"]
NODE = ["@huggingface/transformers", "onnxruntime-node"]


def main() -> None:
    cache = Path(os.environ.get("POPCOMPILE_CACHE") or "~/.cache/popcompile").expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="of the unified layout")
    parser.add_argument("--work", type=Path, default=cache / "clients", help="of environments (default %(default)s)")
    parser.add_argument("--genai-include", type=Path, metavar="DIR", help="folder with ort_genai.h")
    options = parser.parse_args()
    package = options.package.resolve()
    tokenizer = AutoTokenizer.from_pretrained(package, trust_remote_code=False, local_files_only=True)
    prompts = {text: tokenizer(text)["input_ids"] for text in PROMPTS}
    expected = {text: _ours(package, ids) for text, ids in prompts.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for client, command, environment in _clients(options.work.resolve(), options.genai_include, Path(folder)):
            same = []
            for text, ids in prompts.items():
                given = json.dumps(ids) if client == "onnxruntime-node" else text
                found = json.loads(_run([*command, str(package), given, str(NEW_TOKENS)], environment))
                tokens = expected[text]
                same.append(found == (tokens if isinstance(found, list) else tokenizer.decode(tokens)))
            rows.append([client, "yes" if all(same) else "no"])
    print(tabulate(rows, ["client", "popcompile's tokens"], tablefmt="github"))
    raise SystemExit(any(row[1] == "no" for row in rows))


def _ours(package: Path, ids: list[int]) -> list[int]:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens: list[int] = popcompile.load(package).generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return tokens


def _clients(work: Path, include: Path | None, folder: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Name, command before its arguments, and changes to the environment of each client."""
    yield "onnxruntime", [sys.executable, str(HERE / "onnxruntime_loop.py")], {}
    optimum = work / "optimum"
    if not (optimum / "installed").exists():
        venv.create(optimum, clear=True, with_pip=True)
        _run([str(optimum / "bin" / "pip"), "install", "-q", *OPTIMUM])
        (optimum / "installed").touch()
    yield "optimum", [str(optimum / "bin" / "python"), str(HERE / "optimum_generate.py")], {}
    node = work / "node"
    if not (node / "node_modules").is_dir():
        node.mkdir(parents=True, exist_ok=True)
        (node / "package.json").write_text("{}")
        _run(["npm", "install", "--ignore-scripts", "--prefix", str(node), *NODE])  # scripts fetch CUDA libraries
    for client, script in (("onnxruntime-node", "onnxruntime_loop.mjs"), ("transformers.js", "transformersjs.mjs")):
        shutil.copy(HERE / script, node)  # Node looks for packages from where the script lies
        yield client, ["node", str(node / script)], {}
    if include is not None:
        library, runtime = (_package_folder(name) for name in ("onnxruntime_genai", "onnxruntime"))
        program = folder / "genai"
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", str(HERE / "genai.cpp"), f"-I{include}", f"-L{library}"]
        _run([*compiler, "-lonnxruntime-genai", f"-Wl,-rpath,{library}", "-o", str(program)])
        (folder / "libonnxruntime.so").symlink_to(next((runtime / "capi").glob("libonnxruntime.so.*")))
        yield "onnxruntime-genai, C++", [str(program)], {"LD_LIBRARY_PATH": str(folder)}


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed; pip install onnxruntime-genai-cuda")
    return Path(found.origin).parent


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What the command prints on stdout last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    main()
