"""MODEL and adapter folders that nobody should trust: nothing hangs, nothing outside is read, no code runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cli, refusal, refusal_to_open, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from popcompile.conversion import convert
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.source import open_source
from popcompile.loading import CONFIG_BYTES
from popcompile.pruning.analyze import source_tokenizer

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    *ADAPTER,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapter in one folder."""
    folder = save_model(tmp_path_factory.mktemp("hostile") / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Nothing here takes long; a read that waits is ended."""

    def late(*_: Any) -> None:
        raise TimeoutError("20 s of processor time, or 300 s in all")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before, started = signal.signal(signal.SIGALRM, late), time.process_time()
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < 20


def use(folder: Path, out: Path) -> None:
    """Everything that a conversion reads of a model and an adapter."""
    source = open_source(str(folder))
    source.save_tokenizer(out)
    source.fingerprint()
    Adapter(str(folder))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))


# What is no regular file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**40)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("make", [pipe, endless, Path.mkdir, huge])
def test_no_regular_file(make: Callable[[Path], None], file: str, folder: Path, tmp_path: Path) -> None:
    (folder / file).unlink()
    make(folder / file)
    if make is Path.mkdir and file.startswith("tokenizer"):
        return  # not looked at: a folder of that name is no tokenizer
    words = {pipe: "a pipe or device", endless: "a pipe or device", Path.mkdir: "a folder", huge: "has more than"}[make]
    if file == "model.safetensors" and make is huge:
        words = "truncated or corrupt"
    assert f"{file} " in (line := refusal(lambda: use(folder, tmp_path / "out"))) and words in line


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices")
def test_shards_and_models_that_are_no_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"x": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pipe(folder / "a.safetensors")
    assert "a.safetensors is a pipe or device, not a regular file" in refusal_to_open(folder)
    pipe(tmp_path / "model.gguf")
    for model in (tmp_path / "model.gguf", "/dev/zero", "/dev/null"):
        assert "is a pipe or device, not a regular file" in refusal_to_open(model)
    assert "a pipe or device" in refusal_to_open(tmp_path, gguf_file="model.gguf")
    assert "is a file; give the folder" in refusal(lambda: Adapter("/dev/zero"))


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's cache is made of them. One that leads nowhere is reported."""
    blobs = Path(shutil.copytree(folder, tmp_path / "blobs"))
    for file in FILES:
        (folder / file).unlink()
        (folder / file).symlink_to(blobs / file)
    use(folder, tmp_path / "out")
    (blobs / "tokenizer.json").unlink()
    assert "tokenizer.json cannot be read" in refusal(lambda: use(folder, tmp_path / "out"))


# JSON that is hardly JSON


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", ADAPTER[0]])
def test_odd_json(file: str, folder: Path, tmp_path: Path) -> None:
    content = (folder / file).read_bytes()
    deep = b'{"x":' * 70 + b"1" + b"}" * 70
    for changed, words in {
        b"": "is not JSON",
        b"\xff\xfe{": "is not JSON",
        b"{" * 10**5: "is not JSON",
        b'{"x": "\\ud800"}': "is not JSON",
        b'{"x": ' + b"9" * 5000 + b"}": "is not JSON",
        b"{\"x\": '\0'}": "is not JSON",
        b"[]": "is not a JSON object",
        deep: "is nested more than 64 deep",
        b'{"x": "' + b"x" * CONFIG_BYTES + b'"}': "has more than",
    }.items():
        (folder / file).write_bytes(changed)
        if not (words == "has more than" and file == "tokenizer_config.json"):
            assert f"{file} {words}" in refusal(lambda: use(folder, tmp_path / "out"))
    twice = content.rstrip()[:-1] + b', "use_cache": true, "use_cache": true}'
    (folder / file).write_bytes(twice)
    use(folder, tmp_path / "out")
    if file != "generation_config.json":  # transformers reads that one itself
        (folder / file).write_bytes(b"\xef\xbb\xbf" + content)
        use(folder, tmp_path / "out")


# Sizes


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 4000}, {"num_labels": 10**9}, {"hidden_size": 2**40},
        {"vocab_size": 10**12}, {"num_attention_heads": 10**9, "num_key_value_heads": 10**9}, {"head_dim": 10**9},
        {"max_position_embeddings": 10**12}, {"text_config": {"num_hidden_layers": 10**9}}, {"num_key_value_heads": 3},
        {"num_hidden_layers": 0}, {"vocab_size": 0}, {"layer_types": ["full_attention"] * 3},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_model_has(changes: dict[str, Any], random_weights: bool, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    if random_weights and changes.get("num_hidden_layers") == 4000:
        return  # a model of random weights may have them
    assert "config.json" in refusal_to_open(folder, random_weights=random_weights)


def test_sizes_of_another_checkpoint(folder: Path) -> None:
    for changes, words in (
        ({"num_hidden_layers": 3}, "config.json says 3 layers, the checkpoint has tensors of 2"),
        ({"hidden_size": 48}, "config.json says hidden_size 48, which no tensor of the checkpoint has"),
        ({"vocab_size": 130}, "config.json says vocab_size 130, which no tensor of the checkpoint has"),
    ):
        before = (folder / "config.json").read_bytes()
        edit(folder / "config.json", **changes)
        assert words in refusal_to_open(folder)
        (folder / "config.json").write_bytes(before)


def test_ranks_beyond_the_tensors(folder: Path) -> None:
    for changes in ({"r": 10**6}, {"rank_pattern": {"q_proj": 10**6}}):
        before = (folder / ADAPTER[0]).read_bytes()
        edit(folder / ADAPTER[0], **changes)
        assert "is larger than the adapter's tensors" in refusal(lambda: Adapter(str(folder)))
        (folder / ADAPTER[0]).write_bytes(before)


# Code


def plant(folder: Path, marker: Path) -> None:
    """Files that, where one of them is imported, leave a mark."""
    code = (
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): model_type = 'mine'\n"
        "class M(LlamaForCausalLM): config_class = C\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    for name in ("mine", "peft_plugin", "megatron_core"):
        (folder / f"{name}.py").write_text(code)
    auto = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", "mine.T"]}
    edit(folder / "config.json", auto_map=auto)
    edit(folder / "tokenizer_config.json", auto_map=auto)
    edit(
        folder / ADAPTER[0], auto_mapping={"base_model_class": "M", "parent_library": "mine"},
        base_model_name_or_path=str(folder), megatron_config={"x": 1}, megatron_core="megatron_core",
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"model_type": "mine"}, {"tokenizer_class": "T"}])
def test_code_beside_a_model_is_not_run(
    changes: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(folder, tmp_path / "mark")
    for key, value in changes.items():
        edit(folder / ("tokenizer_config.json" if key == "tokenizer_class" else "config.json"), **{key: value})
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))

    def everything() -> None:
        use(folder, tmp_path / "out")
        source_tokenizer(open_source(str(folder)))
        adapter = Adapter(str(folder))
        adapter.fit(
            "model",
            {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.1.self_attn.q_proj.weight": (32, 32)},
        )
        adapter.merge("model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 32))

    if "model_type" in changes:
        assert "model type mine is code in the checkpoint; to run it: --trust-remote-code" in refusal(everything)
    elif "tokenizer_class" in changes:
        assert "the tokenizer cannot be loaded" in refusal(everything)
    else:
        everything()
    assert not (tmp_path / "mark").exists() and sys.stdin.read(4) == "y\ny\n"
    assert not list(tmp_path.rglob("__pycache__"))


def test_code_runs_where_the_user_says_so(folder: Path, tmp_path: Path) -> None:
    plant(folder, tmp_path / "mark")
    source = open_source(str(folder), trust_remote_code=True)
    assert type(source.config).__name__ == "C" and (tmp_path / "mark").exists()
    assert source.save_tokenizer(tmp_path / "out")


def test_a_package_does_not_ask_for_code(folder: Path, tmp_path: Path) -> None:
    """Its configs are those of the classes that were used."""
    plant(folder, tmp_path / "mark")
    source = open_source(str(folder))
    source.config.save_pretrained(tmp_path / "out")
    source.save_tokenizer(tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" in (folder / name).read_text() and "auto_map" not in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "merges_file", "fast_tokenizer_files"])
def test_a_tokenizer_of_elsewhere_is_not_read(name: str, folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other")
    vocabulary = (other / "tokenizer.json").read_text().replace('"cat"', '"dog"')
    (other / "tokenizer.1.0.0.json").write_text(vocabulary)
    elsewhere = os.path.relpath(other / "tokenizer.1.0.0.json", folder)
    edit(folder / "tokenizer_config.json", **{name: [elsewhere] if name.endswith("s") else elsewhere})
    if name == "fast_tokenizer_files":
        assert "fast_tokenizer_files names files elsewhere" in refusal(lambda: use(folder, tmp_path / "out"))
        return
    use(folder, tmp_path / "out")
    assert '"dog"' not in (tmp_path / "out/tokenizer.json").read_text()


# Names


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "x/" * 3000, "a\0b", "\ud800", "\udcff/x", "org/\udcff", "a" * 200 + "/" + "b" * 300, "~\0"],
)
def test_names_that_are_none(name: str, folder: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for call in (
        lambda: open_source(name),
        lambda: open_source(str(folder), gguf_file=name),
        lambda: Adapter(name),
        lambda: convert(name, out, layers="1"),
    ):
        refusal(call)
    if not any("\ud800" <= character <= "\udfff" for character in name):  # pytest's stderr does not take them
        assert cli.run("convert", name, out)[0] == 2 and cli.run("analyze", folder, "--adapter", name)[0] == 2
    assert not out.exists()


def test_an_adapter_without_tensors(folder: Path) -> None:
    save_file({}, folder / ADAPTER[1])
    assert "has no tensors" in refusal(lambda: Adapter(str(folder)))
