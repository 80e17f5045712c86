"""--text-only: the text decoder of a multimodal checkpoint, beside transformers' whole model on text.

Everything but the text decoder is NaN in these checkpoints (multimodal.py). The default run converts three models;
`pytest -m "slow or not slow"` takes the others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cli, change_tensor, refusal_to_open, save_model
from families import pop_by_hooks
from multimodal import MULTIMODAL, save_multimodal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import popcompile
from popcompile.frontend.decoders import WITH_IMAGES
from popcompile.frontend.source import open_source
from popcompile.frontend.text_decoder import decoder_names
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.pruning.analyze import analyze
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.session import Runtime

DEFAULT = ("gemma3", "qwen2_5_vl", "qwen3_vl")
#: fp32 kernels of two libraries, whose logits are up to 12
TOLERANCE = 1e-4
PRUNED, WINDOW = [0, 2], 3  # of three layers
OPTIONS: dict[str, Any] = {"layers": "0,2", "kv_projection": "layer", "window": WINDOW}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass
class Converted:
    whole: PreTrainedModel
    checkpoint: Path
    out: Path
    package: PopForCausalLM
    manifest: Manifest


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[] if kind in DEFAULT else pytest.mark.slow) for kind in MULTIMODAL],
)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp(request.param)
    whole = save_multimodal(folder / "model", request.param)
    popcompile.convert(folder / "model", folder / "out", text_only=True, **OPTIONS)
    return Converted(
        whole, folder / "model", folder / "out", popcompile.load(folder / "out"), read_manifest(folder / "out")
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Gemma 3 with a tokenizer whose chat template lies beside it, as processors keep theirs."""
    folder = save_model(tmp_path_factory.mktemp("gemma3") / "model")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / file).unlink()
    save_multimodal(folder, "gemma3")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


IDS = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_full_model(converted: Converted) -> None:
    """Logits of every token, past the sliding window."""
    torch.testing.assert_close(converted.package(IDS).logits, converted.whole(IDS).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [WINDOW, 30])
def test_pruned_prefill(converted: Converted, length: int) -> None:
    runtime = Runtime(converted.out)
    logits = runtime.feed([IDS[0, :length]], runtime.new_cache(1), "prefill")
    expected, _ = pop_by_hooks(converted.whole, IDS[:, :length], PRUNED, window=WINDOW)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_generation(converted: Converted) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = converted.whole.generate(IDS, **options)
    assert torch.equal(converted.package.generate(IDS, prefill="full", **options), expected)


def test_the_package_says_of_what_it_is_a_part(converted: Converted) -> None:
    config = converted.package.config
    assert converted.manifest.source["text_decoder_of"] == type(converted.whole).__name__
    assert config.model_type == converted.whole.config.text_config.model_type == converted.manifest.model_type
    assert not hasattr(config, "vision_config")
    assert config.eos_token_id == converted.package.generation_config.eos_token_id == 2


def test_it_is_refused_without_the_option(converted: Converted) -> None:
    """But for models that are compiled with their images."""
    if converted.whole.config.model_type in WITH_IMAGES:
        return
    line = refusal_to_open(converted.checkpoint)
    assert "takes more than text; popcompile compiles" in line and "the text decoder alone, here of model type" in line
    assert line.endswith("add --text-only")


# --- where the tensors stand -----------------------------------------------------------------------------------

#: of the decoder, and of its head: what transformers of several versions and models writes
LAYOUTS = [
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
    ("model.text_model.", ""),
    ("model.", ""),
    ("_orig_mod.thinker.model.", "_orig_mod.thinker."),
]
OTHERS = ["visual.blocks.0.weight", "vision_tower.encoder.layers.0.self_attn.q_proj.weight", "talker.lm_head.weight"]


@pytest.mark.parametrize(("prefix", "head"), LAYOUTS)
def test_names(prefix: str, head: str) -> None:
    with torch.device("meta"):
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        llama = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **sizes))
    parts = [name.removeprefix("model.") for name in llama.state_dict() if name != "lm_head.weight"]
    expected = {f"model.{part}": prefix + part for part in parts} | {"lm_head.weight": f"{head}lm_head.weight"}
    beside = [f"{prefix}vision_tower.encoder.layers.0.self_attn.q_proj.weight", *OTHERS]
    assert decoder_names([*beside, *expected.values()], llama) == expected
    assert decoder_names(OTHERS[:1], llama) == {}


def test_a_text_config_whose_tensors_stand_under_a_prefix(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config["text_config"]))
    source = open_source(str(checkpoint), text_only=True)
    assert source.whole is None and source.config.model_type == "gemma3_text"
    stored = load_file(checkpoint / "model.safetensors")
    assert torch.equal(source.read("model.norm.weight"), stored["language_model.model.norm.weight"])


# --- what comes along, and who else takes the option -----------------------------------------------------------


def test_the_chat_template_of_a_processor(pristine: Path, tmp_path: Path) -> None:
    assert "tokenizer.json" in open_source(str(pristine), text_only=True).save_tokenizer(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


def test_a_text_model_is_taken_as_it_is(tmp_path: Path) -> None:
    """So a script gives the option for every model."""
    model = str(save_model(tmp_path / "model"))
    source = open_source(model, text_only=True)
    assert type(source) is type(open_source(model)) and source.whole is None


def test_the_config_alone(pristine: Path) -> None:
    source = open_source(str(pristine), text_only=True, random_weights=True)
    assert source.whole is not None and source.kind == "random" and source.config.model_type == "gemma3_text"


def test_analyze(pristine: Path) -> None:
    found = analyze(pristine, text_only=True, texts=1, tokens=4)
    assert len(found.importance.prefill) == 3


# --- bad input -------------------------------------------------------------------------------------------------


def edit(**changes: Any) -> Callable[[Path], None]:
    """Of config.json; a dictionary is taken into the one that is there."""

    def apply(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        for name, value in changes.items():
            content[name] = content[name] | value if isinstance(value, dict) else value
        (model / "config.json").write_text(json.dumps(content))

    return apply


def without(part: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if part not in name}, model / "model.safetensors")

    return apply


NORM = "language_model.model.layers.1.input_layernorm.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a list": (edit(text_config=[]), "config.json: text_config is"),
    "a number": (edit(text_config=7), "config.json: text_config is"),
    "no known type": (edit(text_config={"model_type": "no_such"}), "the text decoder's model type no_such"),
    "no type at all": (edit(text_config={"model_type": 3}), "the text decoder's model type 3"),
    "an odd field": (edit(text_config={"hidden_size": "wide"}), 'text_config: hidden_size is "wide"'),
    "quantized": (edit(text_config={"quantization_config": {"quant_method": "awq"}}), "(quant_method awq)"),
    "one missing": (lambda m: change_tensor(m, NORM, lambda t: None), "has no tensor model.layers.1.input_layernorm"),
    "of another shape": (lambda m: change_tensor(m, NORM, lambda t: t[:8].clone()), "has shape [8], its config asks"),
    "no decoder": (without("language_model."), "config and weights belong to different models"),
    "more layers": (edit(text_config={"num_hidden_layers": 9, "layer_types": None}), "says 9 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, checkpoint: Path, cli: Cli) -> None:
    damage, words = BAD[case]
    damage(checkpoint)
    line = cli.refuses("convert", checkpoint, checkpoint.parent / "out", "--text-only", "--layers", "1")
    assert words in line, line


def test_images_without_a_processor_are_refused_without_the_option(checkpoint: Path, cli: Cli) -> None:
    line = cli.refuses("convert", checkpoint, checkpoint.parent / "out")
    assert "has no preprocessor_config.json" in line and line.rstrip().endswith("--text-only")


def test_inspect(converted: Converted, cli: Cli) -> None:
    status, shown, _ = cli.run("inspect", converted.out)
    assert status == 0 and f"the text decoder of a {type(converted.whole).__name__}" in " ".join(shown.split())
    assert "--text-only" in shown
