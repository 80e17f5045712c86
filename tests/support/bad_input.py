"""Shared by tests of bad input: refusals, popcompile's command line, and a checkpoint as small as can be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from popcompile.cli import main
from popcompile.errors import PopcompileError
from popcompile.frontend.source import open_source


def refusal(call: Callable[[], object]) -> str:
    """The one line with which popcompile refuses a call."""
    with pytest.raises(PopcompileError) as caught:
        call()
    message = str(caught.value)
    assert message == " ".join(message.split()), message
    return message


def refusal_to_open(model: object, **options: Any) -> str:
    """The line with which `open_source` refuses a model; it begins with the model."""
    message = refusal(lambda: open_source(str(model), **options))
    assert message.startswith(str(model)), message
    return message


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


# --- the command line ------------------------------------------------------------------------------------------


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
        changed = [name for name, _ in before.items() ^ snapshot(self._folder).items()]
        assert not changed, changed
        return line


def assert_one_line(status: int, out: str, err: str) -> None:
    assert (status, out) == (2, ""), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("popcompile") and "error: " in err and "internal" not in err, err


#: seconds; it ends what hangs, also on a machine that does much else
TIMEOUT = 600


def popcompile(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """popcompile in a process of its own."""
    command = [sys.executable, "-m", "popcompile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, **options)


# --- checkpoints -----------------------------------------------------------------------------------------------


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A two-layer Llama of random weights with a tokenizer of a few words."""
    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    save_tokenizer(folder, 128)
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of a few words."""
    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat", *(f"w{i}" for i in range(size - 6))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>").save_pretrained(folder)


def change_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Put what `change` makes of a tensor in its place; None removes it."""
    tensors = load_file(model / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), model / "model.safetensors")


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One element of a matrix."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return change


UP = "model.layers.1.mlp.up_proj.weight"
#: change_tensor's change of UP, options of convert, what the line says
TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor | None], list[str], str]] = {
    "missing": (lambda t: None, [], f"has no tensor {UP}; its config describes another model"),
    "shape": (lambda t: t[:, 1:].clone(), [], f"tensor {UP} has shape [64, 31], its config asks for [64, 32]"),
    "integers": (lambda t: t.to(torch.int8), [], f"tensor {UP} holds int8; give an unquantized checkpoint"),
    "NaN": (fill(float("nan")), [], f"tensor {UP} holds NaN or infinity; fix the checkpoint"),
    "fp16 overflow": (fill(1e5), ["--dtype", "fp16"], f"tensor {UP} has values beyond the range of float16; fix"),
}
