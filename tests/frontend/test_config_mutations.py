"""Every field of every config of a model and an adapter, replaced by what does not belong there: success or one line.

The default run takes a sample, `pytest -m slow` all of them, and traces the models that open.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import save_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from popcompile.errors import PopcompileError
from popcompile.export.genai_config import genai_config
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.source import open_source
from popcompile.frontend.tracing import trace

NESTED: Any = {"x": [{"x": [None, True, {"x": "x"}]}]}
VALUES: tuple[Any, ...] = (
    *(None, True, "x", -1, 0, 10**12, 1.5, [], {}, [None], NESTED, float("nan"), float("inf"), 10**400, "\ud800"),
    *(["x"], [-1], [10**12], {"x": 10**12}, "../../x", 2**31 - 1),
)
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
#: fields that the tiny model's files do not have, and others have
MORE: dict[str, dict[str, Any]] = {
    "config.json": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e4, "layer_types": ["full_attention"],
        "torch_dtype": "float32", "quantization_config": None, "auto_map": {}, "num_labels": 2, "id2label": {"0": "x"},
        "sliding_window": 4, "text_config": {}, "save_pretrained": 1, "attribute_map": {}, "per_layer_config": {},
        "_attn_implementation": "eager", "is_decoder": True, "tokenizer_class": "x", "n_layer": 2,
    },
    "generation_config.json": {
        "eos_token_id": [2], "temperature": 0.5, "top_k": 5, "top_p": 0.9, "do_sample": True, "stop_strings": ["x"],
        "bad_words_ids": [[3]], "watermarking_config": {}, "cache_config": {}, "validate": 1, "num_beams": 1,
    },
    "tokenizer_config.json": {
        "chat_template": "{{ messages }}", "bos_token": "<s>", "padding_side": "left", "add_bos_token": True,
        "added_tokens_decoder": {"3": {"content": "the"}}, "auto_map": {"AutoTokenizer": ["t.T", None]},
        "model_input_names": ["input_ids"], "fast_tokenizer_files": ["tokenizer.json"], "tokenizer_file": "/dev/zero",
        "vocab_file": "/dev/zero", "extra_special_tokens": ["<x>"], "init_inputs": [], "name_or_path": "x",
    },
    "adapter_config.json": {"init_r": 4, "loftq_config": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapter in one folder."""
    folder = save_model(tmp_path_factory.mktemp("mutations") / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.1": 2}, alpha_pattern={"layers.1": 3})
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(folder)
    return folder


def paths(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every field stands, fields of fields too."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*at, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return copy


def mutations(folder: Path) -> Iterator[tuple[str, tuple[Any, ...], Any, Any]]:
    """File, where in it, the new value, the new content."""
    for file in FILES:
        content = json.loads((folder / file).read_bytes())
        more = MORE[file] if file != "config.json" else {k: v for k, v in MORE[file].items() if k != "layer_types"}
        for base in (
            (content, content | more)
            if file != "config.json"
            else (content, *({**content, k: v} for k, v in more.items()))
        ):
            for path in paths(base):
                if base is content or path[0] not in content:
                    yield from ((file, path, value, changed(base, path, value)) for value in VALUES)


def use(folder: Path, out: Path, traced: bool) -> None:
    """What a conversion does with a folder's configs."""
    source = open_source(str(folder))
    source.config.save_pretrained(out)
    source.generation_config.save_pretrained(out)
    json.dumps(
        genai_config(
            source.config, source.generation_config, graphs={"prefill": "a", "decode": "b"}, head_size=8, kv_heads=2,
            vocab_size=128, provider="cpu",
        )
    )  # fmt: skip
    if source.save_tokenizer(out):
        AutoTokenizer.from_pretrained(out, trust_remote_code=False)("the cat")
    adapter = Adapter(str(folder))
    shapes = {name: info.shape for name, info in source.tensors().items()}
    adapter.fit("model", shapes)
    adapter.merge("model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 32))
    if traced:
        trace(source.config)


def outcomes(pristine: Path, tmp_path: Path, cases: list[Any], traced: bool) -> dict[str, int]:
    counts = {"success": 0, "refused": 0}
    failed = []
    for number, (file, path, value, content) in enumerate(cases):
        folder, out = tmp_path / f"model{number}", tmp_path / f"out{number}"
        shutil.copytree(pristine, folder)
        (folder / file).write_text(json.dumps(content))
        where, started = f"{file}: {'.'.join(map(str, path))} = {value!r:.40}", time.process_time()
        try:
            use(folder, out, traced and file == "config.json")
            counts["success"] += 1
        except PopcompileError as error:
            counts["refused"] += 1
            if len(str(error).splitlines()) != 1:
                failed.append(f"{where}: {error}")
        except Exception as error:
            failed.append(f"{where}: {type(error).__name__}: {error}")
        if time.process_time() - started > 20:
            failed.append(f"{where}: took {time.process_time() - started:.0f} s")
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert not failed, "\n".join(failed)
    return counts


def test_the_files_as_they_are_and_a_sample(pristine: Path, tmp_path: Path) -> None:
    use(pristine, tmp_path / "out", traced=True)
    cases = random.Random(18).sample(list(mutations(pristine)), 150)
    counts = outcomes(pristine, tmp_path, cases, traced=False)
    assert min(counts.values()) > 10, counts


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_field(file: str, pristine: Path, tmp_path: Path) -> None:
    cases = [case for case in mutations(pristine) if case[0] == file]
    print(file, outcomes(pristine, tmp_path, cases, traced=True))
