"""Sources: what can be opened, that only headers are read, and how each bad input is reported."""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bad_input import refusal_to_open
from safetensors.torch import save_file
from tiny_gguf import VOCABULARY, WORDS, save_gguf, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from popcompile.errors import PopcompileError
from popcompile.frontend.source import TensorInfo, open_source, random_tensor


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with tokenizer and chat template, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    return tmp_path / "sharded"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What can be opened


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_every_tensor_equals_the_saved_one(layout: str, request: pytest.FixtureRequest) -> None:
    source = open_source(str(request.getfixturevalue(layout)))
    saved = tiny_model().state_dict()
    assert (source.kind, source.config.num_hidden_layers, source.generation_config.eos_token_id) == ("folder", 2, 2)
    assert source.tensors() == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in saved.items()}
    for name, tensor in saved.items():
        assert torch.equal(source.read(name), tensor)
    with pytest.raises(PopcompileError, match=r"no tensor model\.nothing; the checkpoint does not fit"):
        source.read("model.nothing")


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert {info.dtype for info in source.tensors().values()} == {torch.bfloat16}
    assert source.read("model.norm.weight").dtype == torch.bfloat16


def test_the_saved_tokenizer_is_the_same(folder: Path, tmp_path: Path) -> None:
    files = open_source(str(folder)).save_tokenizer(tmp_path / "out")
    assert files == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after("the cat sat").input_ids == before("the cat sat").input_ids == [3, 4, 5]
    assert after.chat_template == before.chat_template


def test_a_model_without_tokenizer_saves_none(sharded: Path, tmp_path: Path) -> None:
    assert open_source(str(sharded)).save_tokenizer(tmp_path / "out") == []


def test_fingerprint_follows_config_and_headers(folder: Path, sharded: Path) -> None:
    first = open_source(str(folder)).fingerprint()
    assert first["config_sha256"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert first == open_source(str(folder)).fingerprint()
    assert first["safetensors_headers_sha256"] != open_source(str(sharded)).fingerprint()["safetensors_headers_sha256"]


def test_gguf_is_read_under_the_names_of_transformers(tiny_gguf: Path, tmp_path: Path) -> None:
    source = open_source(str(tiny_gguf))
    assert source.kind == "gguf"
    assert not hasattr(source.config, "quantization_config")
    assert source.config.architectures == ["LlamaForCausalLM"]
    saved = tiny_model().state_dict()
    del saved["lm_head.weight"]  # tied
    assert source.tensors() == {name: TensorInfo(tuple(t.shape), torch.float32) for name, t in saved.items()}
    for name, tensor in saved.items():
        if "q_proj" not in name and "k_proj" not in name:  # llama.cpp permutes the rows of these two for its RoPE
            assert torch.equal(source.read(name), tensor)
    assert source.save_tokenizer(tmp_path) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert AutoTokenizer.from_pretrained(tmp_path)("cat").input_ids == [VOCABULARY.index("cat")]
    assert int(source.fingerprint()["gguf_bytes"]) == tiny_gguf.stat().st_size
    assert open_source(str(tiny_gguf.parent), gguf_file="tiny.gguf").fingerprint() == source.fingerprint()


def test_gguf_without_vocabulary_saves_no_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    renamed = tiny_gguf.read_bytes().replace(b"tokenizer.ggml.tokens", b"general.no_vocabulary")
    (tmp_path / "bare.gguf").write_bytes(renamed)
    source = open_source(str(tmp_path / "bare.gguf"), random_weights=True)
    assert (source.kind, source.tensors(), source.save_tokenizer(tmp_path)) == ("random", {}, [])
    assert list(source.fingerprint()) == ["gguf_header_sha256"]


def test_random_weights_need_only_the_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    edit_json(tmp_path / "bare/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    source = open_source(str(tmp_path / "bare"), random_weights=True)
    assert (source.kind, source.tensors(), source.save_tokenizer(tmp_path)) == ("random", {}, [])
    assert not hasattr(source.config, "quantization_config")
    assert list(source.fingerprint()) == ["config_sha256"]


def test_random_tensors_depend_on_their_name_alone() -> None:
    weight = random_tensor("model.layers.0.mlp.up_proj.weight", (64, 64), torch.float32)
    torch.manual_seed(1)
    assert torch.equal(weight, random_tensor("model.layers.0.mlp.up_proj.weight", (64, 64), torch.float32))
    assert not torch.equal(weight, random_tensor("model.layers.1.mlp.up_proj.weight", (64, 64), torch.float32))
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)  # 4,096 samples: the estimate's own error is 1.1 %
    assert weight[0, 0].item() == pytest.approx(-0.019666919, rel=1e-5)  # the same on every machine
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "layers.0.q_norm.weight"):
        assert torch.equal(random_tensor(name, (8,), torch.bfloat16), torch.ones(8, dtype=torch.bfloat16))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
def test_headers_and_one_tensor_of_a_huge_checkpoint_cost_no_memory(folder: Path) -> None:
    size = 2**32
    header = {
        f"layers.{i}.big": {"dtype": "F32", "shape": [2**21, 16, 32], "data_offsets": [i * size, (i + 1) * size]}
        for i in (0, 1)
    }
    header["small"] = {"dtype": "F32", "shape": [4], "data_offsets": [2 * size, 2 * size + 16]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:  # 8 GiB, nearly all of it a hole
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.seek(2 * size, os.SEEK_CUR)
        stream.write(struct.pack("<4f", 1, 2, 3, 4))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, start = resident(), time.perf_counter()
    source = open_source(str(folder))
    assert source.tensors()["layers.1.big"] == TensorInfo((2**21, 16, 32), torch.float32)
    assert source.read("small").tolist() == [1, 2, 3, 4]
    assert source.fingerprint()["safetensors_bytes"] == str((folder / "model.safetensors").stat().st_size)
    assert resident() - before < 2**26  # 64 MiB is far below one tensor of 4 GiB
    assert time.perf_counter() - start < 5


# What the hub's cache gives, and what is said where the hub cannot be reached

HUB_SCRIPT = """
import json, sys, time
from popcompile.errors import PopcompileError
from popcompile.frontend.source import open_source
for model in sys.argv[1:]:
    start = time.perf_counter()
    try:
        source = open_source(model)
        said = [source.kind, source.fingerprint().get("revision", ""), len(source.tensors())]
    except PopcompileError as error:
        said = str(error)
    print(json.dumps([said, time.perf_counter() - start]))
"""


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_cached_hub_ids_open_and_others_fail_soon(
    network: dict[str, str], pristine: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--org--tiny"
    shutil.copytree(pristine, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    missing = ["org/none", "foo", "a/b/c", "x" * 300]
    run = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, "org/tiny", str(tiny_gguf), *missing],
        env=os.environ | network | {"HF_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    said = [json.loads(line) for line in run.stdout.splitlines()]
    assert said[0][0] == ["hub", commit, 21]
    assert said[1][0] == ["gguf", "", 20]
    for (message, seconds), model in zip(said[2:], missing, strict=True):
        assert message == (
            f"{model}: no such folder or file, and not in the local Hugging Face cache (the hub cannot be reached); "
            "give a local folder, a .gguf file, or a cached hub id"
        )
        assert seconds < 5
    assert run.stderr == ""  # neither progress bars nor warnings where stderr is not a terminal


# Bad folders


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def quantize(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda f: truncate(f / "config.json", 40), "config.json is not JSON"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "config is nested": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json is not JSON"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "config.json: no model_type"),
    "odd model type": (lambda f: edit_json(f / "config.json", model_type=["llama"]), "does not know model type"),
    "odd field": (lambda f: edit_json(f / "config.json", hidden_size="wide"), "config.json is malformed"),
    "odd heads": (lambda f: edit_json(f / "config.json", num_attention_heads=0, head_dim=None), "malformed"),
    "odd generation config": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is"),
    "quantized": (quantize, "quantized checkpoint .quant_method awq.; give the unquantized one"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no .*index.json"),
    "pickles": (only_pickles, "only pickled weights, which popcompile never loads; convert them to safetensors"),
    "truncated": (lambda f: truncate(f / "model.safetensors", 9000), "model.safetensors is truncated or corrupt"),
    "header cut": (lambda f: truncate(f / "model.safetensors", 100), "model.safetensors is truncated or corrupt"),
    "empty": (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors is truncated or corrupt"),
    "fp8": (
        lambda f: save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, f / "model.safetensors"),
        "w has dtype F8_E4M3",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(case: str, folder: Path) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(PopcompileError, match=message):
        open_source(str(folder))
    refusal_to_open(folder)


def test_broken_index(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(set(weight_map.values()))[0]
    edit_json(index, weight_map=weight_map | {"model.extra.weight": first})
    assert f"{first} lacks model.extra.weight, which {index.name} names" in refusal_to_open(sharded)
    edit_json(index, weight_map=weight_map | {"model.extra.weight": "../elsewhere.safetensors"})
    assert "names ../elsewhere.safetensors, which is missing" in refusal_to_open(sharded)
    edit_json(index, weight_map=weight_map)
    (sharded / first).unlink()
    assert f"names {first}, which is missing" in refusal_to_open(sharded)
    edit_json(index, weight_map=None)
    assert "has no weight_map" in refusal_to_open(sharded)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads everything: act as nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("part", ["", "config.json", "model.safetensors"])
def test_unreadable(part: str, folder: Path) -> None:
    for parent in folder.parents:  # pytest's own folders are for their owner alone
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o055 != 0o055 and "pytest" in str(parent):
            parent.chmod(0o755)
    (folder / part).chmod(0)
    with without_privileges():
        assert "permission denied reading" in refusal_to_open(folder)
    (folder / part).chmod(0o755)


def test_odd_names(folder: Path) -> None:
    for name in ("", "  ", "a\0b", "~nobody-here/x", "x" * 5000):
        with pytest.raises(PopcompileError, match="no such folder or file"):
            open_source(name)
    assert "model.safetensors is not a GGUF file" in refusal_to_open(folder / "model.safetensors")
    assert "drop --gguf-file" in refusal_to_open(folder / "model.safetensors", gguf_file="x.gguf")
    assert "has no file x.gguf; its .gguf files: none" in refusal_to_open(folder, gguf_file="x.gguf")


# GGUF files that are not whole


def test_broken_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    bad, whole = tmp_path / "bad.gguf", tiny_gguf.read_bytes()
    for content, message in {
        b"": "bad.gguf is not a GGUF file",
        b"PK\x03\x04": "bad.gguf is not a GGUF file",
        b"GGUF": "the GGUF header is truncated or corrupt",
        b"GGUF" + b"\xff" * 99: "the GGUF header is truncated or corrupt",
        whole[:300]: "the GGUF header is truncated or corrupt",
        whole[: len(whole) // 2]: "truncated: its header needs",
        whole[:-64]: "truncated: its header needs",
        whole.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b""): "the GGUF header is truncated",
        whole.replace(
            b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0zebra"
        ): "GGUF architecture 'zebra'; popcompile reads llama, qwen2,",
    }.items():
        bad.write_bytes(content)
        assert message in refusal_to_open(bad)


def test_one_part_of_a_split_gguf(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "one of 3 parts; merge them first" in refusal_to_open(tmp_path / "part.gguf")
