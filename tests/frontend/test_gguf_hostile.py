"""GGUF files are read alone, and damaged ones end in one line, soon and in little memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import refusal, refusal_to_open
from gguf_files import PLAIN, WORDS, model_of, save_gguf, tensors_of
from transformers import AutoTokenizer, PreTrainedModel

from popcompile.errors import PopcompileError
from popcompile.frontend.gguf import GgufSource
from popcompile.frontend.source import Source, open_source

# --- a file is read alone ------------------------------------------------------------------------------------------


def tokenizer_of(source: Source, folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in source.save_tokenizer(folder)}


def test_the_tokenizer_is_built_once(gguf_file: Path, tmp_path: Path) -> None:
    """Of a real vocabulary that takes seconds, and a conversion writes it to sample text and to the package."""
    source = open_source(str(shutil.copy(gguf_file, tmp_path / "x.gguf")))
    first = tokenizer_of(source, tmp_path / "first")
    (tmp_path / "x.gguf").unlink()
    assert tokenizer_of(source, tmp_path / "second") == first


ATTACK = "import pathlib; pathlib.Path({marker!r}).touch()\nfrom transformers import LlamaTokenizer as X\n"
BESIDE: dict[str, Callable[[Path, Path], None]] = {
    "code": lambda folder, marker: (
        (folder / "code.py").write_text(ATTACK.format(marker=str(marker))),
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": ["code.X", "code.X"]}, "tokenizer_class": "X"})
        ),
    ),
    "another vocabulary": lambda folder, _: (
        AutoTokenizer.from_pretrained(folder, gguf_file="x.gguf").train_new_from_iterator(["zebra"] * 9, 300)
    ).save_pretrained(folder),
    "an adapter": lambda folder, _: (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder / "elsewhere")})
    ),
    "configs": lambda folder, _: (
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "auto_map": {"AutoConfig": "code.X"}})),
        (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 40})),
    ),
    "templates": lambda folder, _: (
        (folder / "chat_template.jinja").write_text("planted"),
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates/more.jinja").write_text("planted"),
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "w3"})),
        (folder / "added_tokens.json").write_text(json.dumps({"zebra": 300})),
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_nothing_beside_a_file_is_read(
    case: str, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "planted"
    folder.mkdir()
    shutil.copy(gguf_file, folder / "x.gguf")
    BESIDE[case](folder, tmp_path / "ran")
    monkeypatch.setattr(sys, "stdin", StringIO("y\n" * 9))
    monkeypatch.chdir(folder)
    before, after = open_source(str(gguf_file)), open_source(str(folder), gguf_file="x.gguf", trust_remote_code=True)
    assert tokenizer_of(after, tmp_path / "after") == tokenizer_of(before, tmp_path / "before")
    assert AutoTokenizer.from_pretrained(tmp_path / "after")("cat").input_ids == [WORDS.index("cat")]
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    assert after.config.to_dict() == before.config.to_dict()
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.tensors())
    assert not (tmp_path / "ran").exists()


def test_a_file_of_the_same_name_in_the_working_folder_is_not_read(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"tokenizer.ggml.tokens": [*reversed(WORDS)]}
    save_gguf(tmp_path / "tiny.gguf", "llama", model_of("llama", **PLAIN), other)
    monkeypatch.chdir(tmp_path)
    assert WORDS.index("cat") != WORDS[::-1].index("cat")
    source = open_source(str(gguf_file))
    source.save_tokenizer(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("cat").input_ids == [WORDS.index("cat")]


def test_the_hubs_cache_links_to_a_blob(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub/models--org--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(gguf_file, snapshot.parents[1] / "blobs/deadbeef")
    (snapshot / "x.gguf").symlink_to("../../blobs/deadbeef")
    source, before = open_source(str(snapshot / "x.gguf")), open_source(str(gguf_file))
    assert tokenizer_of(source, tmp_path / "after") == tokenizer_of(before, tmp_path / "before")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), before.read(name))


@pytest.mark.parametrize("name", ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "..", "."])
def test_names_do_not_leave_the_folder(name: str, gguf_file: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_file, tmp_path / "x.gguf")
    (tmp_path / "a").mkdir()
    message = refusal_to_open(tmp_path / "a", gguf_file=name)
    assert f"--gguf-file {name}: leaves {tmp_path / 'a'}; name a file inside it" in message


def test_names_of_sub_folders_are_read(gguf_file: Path) -> None:
    source = open_source(str(gguf_file.parents[1]), gguf_file=f"{gguf_file.parent.name}/tiny.gguf")
    assert source.config.num_hidden_layers == 2


# --- files that are not whole --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
def test_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    for name in ("pipe.gguf", "zero.gguf"):
        refusal_to_open(tmp_path / name)
        refusal_to_open(tmp_path, gguf_file=name)
        path = tmp_path / name
        assert "not a regular file" in refusal(lambda path=path: GgufSource("x", path))


def test_absurd_counts_end_soon(tmp_path: Path) -> None:
    """A gigabyte of zeros behind a header that promises more; nothing of that size is read or allocated."""
    key = struct.pack("<Q", 1) + b"k"
    headers = {
        "keys": struct.pack("<IQQ", 3, 0, 2**63),
        "many keys": struct.pack("<IQQ", 3, 0, 9_999),
        "tensors": struct.pack("<IQQ", 3, 2**60, 0),
        "string": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 8, 2**62),
        "array": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 12, 2**61),
        "strings": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 8, 2**40),
        "nested": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 9, 2) * 1000,
        "dimensions": struct.pack("<IQQ", 3, 1, 0) + key + struct.pack("<I", 2**31),
    }
    for name, header in headers.items():
        with (tmp_path / "x.gguf").open("wb") as stream:
            stream.write(b"GGUF" + header)
            stream.truncate(2**30)
        started = time.process_time()
        assert "truncated or corrupt" in refusal_to_open(tmp_path / "x.gguf"), name
        assert time.process_time() - started < 2, name


def outcome_of(path: Path, out: Path) -> str:
    """ "" for a file that is read whole, or the line that refuses it. Anything else is raised."""
    try:
        source = open_source(str(path))
        for name, info in source.tensors().items():
            assert source.read(name).shape == info.shape
        source.save_tokenizer(out)
    except PopcompileError as error:
        return str(error)
    return ""


def test_mutated_files(gguf_file: Path, tmp_path: Path) -> None:
    """Each of 100 damaged files is a model that can be read whole, or is refused in one line."""
    random = np.random.default_rng(0)
    whole, path, refused = gguf_file.read_bytes(), tmp_path / "x.gguf", 0
    size = GgufSource("x", gguf_file)._header.size
    extremes = [b"\0", b"\xff", b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**32), struct.pack("<f", math.nan), b"\t"]
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(4, size))
            new = extremes[random.integers(len(extremes))] if random.random() < 0.6 else random.bytes(1)
            content[at : at + len(new)] = new
        if random.random() < 0.1:
            del content[int(random.integers(len(content))) :]
        path.write_bytes(content)
        line = outcome_of(path, tmp_path / "out")
        assert line == " ".join(line.split()) and (not line or line.isprintable()), line
        refused += bool(line)
    assert refused > 50


@pytest.mark.parametrize("value", [0, 2**32 - 1, -1, math.nan, True, "\x1b[0m", [1, 2]])
def test_every_key_with_a_wrong_value(value: Any, gguf_llama: PreTrainedModel, gguf_file: Path, tmp_path: Path) -> None:
    """Each key of the file with a value of another size or type, one at a time."""
    keys = [key for key in GgufSource("x", gguf_file)._header.metadata if not key.startswith("general.")]
    assert len(keys) > 15
    tensors = tensors_of("llama", gguf_llama)
    for number, key in enumerate(keys):
        path = save_gguf(tmp_path / f"{number}.gguf", "llama", gguf_llama, {key: value}, tensors)
        line = outcome_of(path, tmp_path / "out")
        assert line == " ".join(line.split()) and (not line or line.isprintable()), line


BROKEN_TOKENIZERS: dict[str, dict[str, Any]] = {
    "no merges": {"tokenizer.ggml.merges": None},
    "merges of nothing": {"tokenizer.ggml.merges": ["x y", "no-space"]},
    "kind": {"tokenizer.ggml.model": "magic"},
    "number": {"tokenizer.ggml.model": 3},
    "template": {"tokenizer.chat_template": 3},
    "types": {"tokenizer.ggml.token_type": "x"},
    "scores": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None},
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_broken_tokenizers(case: str, gguf_llama: PreTrainedModel, tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "x.gguf", "llama", gguf_llama, BROKEN_TOKENIZERS[case])
    message = refusal(lambda: open_source(str(path)).save_tokenizer(tmp_path / "out"))
    assert "tokenizer" in message
