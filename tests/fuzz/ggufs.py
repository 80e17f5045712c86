"""Damaged GGUF files: header, metadata, tensor table, data, and what lies beside the file."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz.case import AUTO_MAP, Case, Workspace
from fuzz.checkpoints import ANALYZE
from fuzz.hostile import damage_bytes, dumps, short

FILE = "model.gguf"
COMMANDS: dict[tuple[str, ...], int] = {
    ("convert", f"model/{FILE}", "out", "--prune", "99"): 12,
    ("analyze", f"model/{FILE}", *ANALYZE): 5,
    ("convert", f"model/{FILE}", "out", "--kv-projection", "layer", "--prune", "1"): 1,
    ("convert", "model", "out", "--gguf-file", FILE, "--kv-projection", "layer", "--prune", "99"): 1,
}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Gguf:
    """A GGUF file taken apart. metadata: (key, type, value); arrays are (element type, values).

    tensors: (name, dimensions, type, offset, data).
    """

    version: int
    metadata: list[tuple[bytes, int, Any]]
    tensors: list[tuple[bytes, list[int], int, int, bytes]]
    counts: tuple[int, int] | None = None

    def pack(self) -> bytes:
        tensors, metadata = self.counts or (len(self.tensors), len(self.metadata))
        head = b"GGUF" + struct.pack("<IQQ", self.version, tensors % 2**64, metadata % 2**64)
        for key, kind, value in self.metadata:
            head += _string(key) + struct.pack("<I", kind) + _value(kind, value)
        data = b""
        for name, dimensions, kind, offset, content in self.tensors:
            head += _string(name) + struct.pack("<I", len(dimensions))
            head += b"".join(struct.pack("<Q", d % 2**64) for d in dimensions) + struct.pack(
                "<IQ", kind, offset % 2**64
            )
            data += content + bytes(-len(content) % ALIGNMENT)
        return head + bytes(-len(head) % ALIGNMENT) + data


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes) and kind != STRING:
        return value  # as it stands
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(_value(element, v) for v in values)
    return struct.pack(f"<{SCALARS[kind]}", value)


def parse(content: bytes) -> Gguf:
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(f"<{form}")
        return value

    def string() -> bytes:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at]

    def value(kind: int) -> Any:
        if kind == STRING:
            return string()
        if kind == ARRAY:
            element, count = take("I"), take("Q")
            return element, [value(element) for _ in range(count)]
        return take(SCALARS[kind])

    version, tensors, metadata = take("I"), take("Q"), take("Q")
    pairs = []
    for _ in range(metadata):
        key, kind = string(), take("I")
        pairs.append((key, kind, value(kind)))
    table = []
    for _ in range(tensors):
        name, rank = string(), take("I")
        table.append((name, [take("Q") for _ in range(rank)], take("I"), take("Q")))
    start = -(-at // ALIGNMENT) * ALIGNMENT
    ends = sorted([offset for *_, offset in table] + [len(content) - start])
    entries = [(n, d, k, o, content[start + o : start + ends[ends.index(o) + 1]]) for n, d, k, o in table]
    return Gguf(version, pairs, entries)


def make(rng: Random, workspace: Workspace) -> Case:
    model = Path(shutil.copytree(workspace.bases / "gguf", workspace.root / "model"))
    path = model / FILE
    parts = list(rng.choices(list(COMMANDS), list(COMMANDS.values()))[0])
    expect, how = "transformers", rng.random()
    if how < 0.2:
        content, words = damage_bytes(path.read_bytes(), rng)
        if rng.random() < 0.5:  # within the header, where most of it is
            head = path.read_bytes()[:1500]
            content, words = damage_bytes(head, rng)
            content += path.read_bytes()[1500:]
        path.write_bytes(content)
    elif how < 0.6:
        file = parse(path.read_bytes())
        words = _metadata(rng, file)
        path.write_bytes(file.pack())
    elif how < 0.9:
        file = parse(path.read_bytes())
        words = _table(rng, file)
        path.write_bytes(file.pack())
    else:
        words, expect = _beside(rng, workspace, model), "same"
    out = ["out"] if parts[0] == "convert" else []
    if "99" in parts:
        expect = "refused"
    return Case(f"{FILE}: {words}", parts, expect, base="gguf", model="model", gguf=FILE, out=out,
                package="out" if out else None)  # fmt: skip


def _metadata(rng: Random, file: Gguf) -> str:
    how = rng.choice(["value"] * 5 + ["type", "drop", "twice", "add", "add", "add", "counts", "rename"])
    index = rng.randrange(len(file.metadata))
    key, kind, value = file.metadata[index]
    name = key.decode()
    if how == "drop":
        del file.metadata[index]
        return f"{name} is gone"
    if how == "twice":
        file.metadata.append(file.metadata[index])
        return f"{name} is there twice"
    if how == "counts":
        odd = rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(file.tensors) + 1])
        both = [len(file.tensors), len(file.metadata)]
        which = rng.randrange(2)
        both[which] = odd
        file.counts = (both[0], both[1])
        return f"{odd} {['tensors', 'keys'][which]} by its header"
    if how == "rename":
        other = rng.choice([b"", b"x", b"\xff\xfe", b"a" * 5000, b"\x1b[2J", key + b"_", key.upper()])
        file.metadata[index] = (other, kind, value)
        return f"{name} is called {short(other)}"
    if how == "type":
        other_kind = rng.choice([*SCALARS, STRING, ARRAY, 13, 99, 2**31])
        raw = _value(kind, value)
        file.metadata[index] = (key, other_kind, raw if other_kind != STRING else raw[8:] or b"x")
        return f"{name} has type {other_kind}"
    if how == "add":
        added: list[tuple[bytes, int, Any]] = [
            (b"general.alignment", 4, rng.choice([0, 1, 3, 64, 2**31])), (b"split.count", 2, 3), (b"split.count", 5,
            -1),
            (b"llama.rope.scaling.type", STRING, b"linear"), (b"llama.rope.scaling.factor", 6, 4.0), (b"x.y", 4, 1),
            (b"llama.rope.dimension_count", 4, rng.choice([0, 2, 7, 2**31])), (b"llama.expert_count", 4, 4),
            (b"llama.attention.key_length", 4, rng.choice([0, 3, 64, 2**31])), (b"llama.attention.sliding_window", 4,
            4),
            (b"tokenizer.ggml.pre", STRING, b"nothing"), (b"tokenizer.ggml.add_bos_token", 7, True),
            (b"tokenizer.chat_template", STRING, b"{{ 1/0 }}"), (b"tokenizer.chat_template", STRING, b"{% bad"),
            (b"tokenizer.ggml.scores", ARRAY, (6, [0.0])), (b"llama.logit_scale", 6, 3.0), (b"llama.attention.scale",
            6, 9.0),
            (b"general.architecture", STRING, rng.choice([b"llama", b"qwen2", b"clip", b""])),
            (b"adapter.type", STRING, b"lora"), (b"general.type", STRING, b"adapter"), (b"llama.pooling_type", 4, 1),
            (b"llama.attention.causal", 7, False), (b"llama.use_parallel_residual", 7, True),
            (b"tokenizer.huggingface.json", STRING, b"{"),
        ]  # fmt: skip
        pair = rng.choice(added)
        file.metadata.append(pair)
        return f"{pair[0].decode()} = {short(pair[2])} is added"
    other_value: Any
    if kind == STRING:
        other_value = rng.choice(
            [b"", b"\xff", b"x", b"a" * 5000, b"\x00", b"qwen2", b"llama4", b"gpt2", b"\x1b[2J", b"bert"]
        )
    elif kind == ARRAY:
        element, values = value
        other_value = copy.deepcopy(rng.choice([
            (element, []), (element, values[:-1]), (element, values * 2), (element, values[:1]), (4, list(range(5))),
            (STRING, [b"\xff"] * len(values)), (STRING, [b"the"] * len(values)), (ARRAY, [(4, [1])] * 3), (7, [True]),
            (6, [float("nan")] * len(values)),
        ]))  # fmt: skip
        file.metadata[index] = (key, kind, other_value)
        return f"{name} = an array of {len(other_value[1])} of type {other_value[0]}"
    elif kind == 6:
        other_value = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30])
    elif kind == 7:
        other_value = not value
    else:
        limit = 2 ** (8 * struct.calcsize(SCALARS[kind])) - 1
        other_value = rng.choice([0, 1, 3, value + 1, limit, limit // 2, 10**9 % (limit + 1)])
        if SCALARS[kind].islower():
            other_value = min(other_value, limit // 2)
    file.metadata[index] = (key, kind, other_value)
    return f"{name} = {short(other_value)}"


def _table(rng: Random, file: Gguf) -> str:
    index = rng.randrange(len(file.tensors))
    name, dimensions, kind, offset, data = file.tensors[index]
    label, how = (
        name.decode(),
        rng.choice(["name", "dims", "dims", "type", "offset", "drop", "twice", "add", "data", "version"]),
    )
    if how == "drop":
        del file.tensors[index]
        return f"{label} is gone from the table"
    if how == "twice":
        file.tensors.append(file.tensors[index])
        return f"{label} is there twice"
    if how == "version":
        file.version = rng.choice([0, 1, 2, 4, 2**31, 0x03000000])
        return f"version {file.version}"
    if how == "add":
        added = rng.choice(
            [
                "rope_freqs.weight",
                "x",
                "blk.7.attn_q.weight",
                "blk.0.attn_q.bias",
                "output.weight",
                "blk.0.attn_sinks.weight",
            ]
        )
        size = {"rope_freqs.weight": [2], "output.weight": dimensions}.get(added, [4])
        end = max(o + len(d) for *_, o, d in file.tensors)
        file.tensors.append(
            (added.encode(), size, 0, -(-end // 32) * 32, struct.pack("<f", 2.0) * (size[0] * (size[1:] or [1])[0]))
        )
        return f"a tensor {added}"
    if how == "name":
        name = rng.choice([b"", b"x", b"\xff", b"a" * 200, name.upper(), name + b"x", b"blk.99.attn_q.weight",
                           b"blk..attn_q.weight",
                           b"\x1b[2J", b"blk.-1.attn_q.weight", b"blk.99999999999999999999.attn_q.weight"])  # fmt: skip
    elif how == "dims":
        dimensions = rng.choice([[], [0], [*dimensions, 1], dimensions[::-1], [2**32, 2**32], [2**63],
                                 [dimensions[0] * 2],
                                 [1] * 9, [2**40], [dimensions[0] - 1, *dimensions[1:]]])  # fmt: skip
    elif how == "type":
        kind = rng.choice([1, 2, 3, 8, 10, 14, 24, 27, 30, 31, 36, 99, 2**31, 39, 12])
    elif how == "offset":
        offset = rng.choice([0, 1, offset + 32, 2**40, 2**63, 2**64 - 32, offset + 4])
    else:
        data = rng.choice([b"\xff" * len(data), b"", bytes(len(data)), data[: len(data) // 2]])
    file.tensors[index] = (name, dimensions, kind, offset, data)
    return f"{label}: {how}: {short(name)} {dimensions} type {kind} at {offset}, {len(data)} bytes"


def _beside(rng: Random, workspace: Workspace, model: Path) -> str:
    """Other files in the folder; the GGUF is whole and is read alone."""
    tokenizer = json.loads((workspace.bases / "model" / "tokenizer.json").read_bytes())
    files: dict[str, Any] = {
        "tokenizer_config.json": {"auto_map": AUTO_MAP, "tokenizer_class": "Tokenizer"},
        "tokenizer.json": tokenizer,
        "config.json": {"auto_map": AUTO_MAP, "model_type": "unheard"},
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": str(workspace.outside)},
        "generation_config.json": {"eos_token_id": 3, "custom_generate": "."},
        "special_tokens_map.json": {"eos_token": "cat"},
        "added_tokens.json": {"<new>": 3},
        "chat_template.jinja": "foreign",
        "model.safetensors": "x",
    }
    names = rng.sample(sorted(files), rng.choice([1, 1, 2, 3]))
    for name in names:
        content = files[name]
        (model / name).write_bytes(content.encode() if isinstance(content, str) else dumps(content))
    workspace.trap(model / "trap.py")
    workspace.trap(workspace.outside / "trap.py")
    return f"{', '.join(names)} and a trap.py beside it"
