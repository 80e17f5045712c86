"""`--adapter`: a package of base model and adapter computes what PEFT's own merged model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cli, save_model
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import popcompile
from popcompile.conversion import convert
from popcompile.report.inspection import inspect_text

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
PROMPT = torch.tensor([[3, 4, 5, 3, 4, 5, 6, 7]])

ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=PROJECTIONS),
    "every layer": LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "patterns": LoraConfig(
        r=4, target_modules=PROJECTIONS, rank_pattern={r"layers\.1\..*q_proj": 2}, alpha_pattern={"v_proj": 32}
    ),
    "one layer by expression": LoraConfig(r=2, lora_alpha=8, target_modules=r".*layers\.1\.self_attn\.[qk]_proj"),
    "dora": LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True),
    "embedding, whole head": LoraConfig(
        r=4, lora_alpha=16, target_modules=["embed_tokens", "k_proj"], modules_to_save=["lm_head"]
    ),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("adapters") / "base", tie_word_embeddings=False)


def save_adapter(base: Path, folder: Path, config: PeftConfig, **options: Any) -> PeftModel:
    """Train at random: an adapter as PEFT writes it, and the model that has it."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_as_peft_does(name: str, base: Path, tmp_path: Path) -> None:
    model = save_adapter(base, tmp_path / "adapter", ADAPTERS[name])
    merged = model.merge_and_unload()
    with torch.no_grad():
        expected = merged(PROMPT).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(PROMPT).logits
    convert(base, tmp_path / "out", layers="1", adapter=tmp_path / "adapter")
    logits = popcompile.load(tmp_path / "out")(PROMPT, prefill="full").logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2  # the adapter matters


@pytest.mark.parametrize("config", [ADAPTERS["ia3"], LoraConfig(r=4, target_modules=PROJECTIONS, lora_bias=True)])
def test_biases(config: PeftConfig, tmp_path: Path) -> None:
    """Methods that change the biases of the layers that they adapt."""
    base = save_model(tmp_path / "base", attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn_like(parameter)
    model.save_pretrained(base)
    merged = save_adapter(base, tmp_path / "adapter", config).merge_and_unload()
    with torch.no_grad():
        expected = merged(PROMPT).logits
    convert(base, tmp_path / "out", layers="1", kv_projection="layer", adapter=tmp_path / "adapter")
    logits = popcompile.load(tmp_path / "out")(PROMPT, prefill="full").logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D, here square ones."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, n_inner=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merged = save_adapter(tmp_path / "base", tmp_path / "adapter", lora).merge_and_unload()
    with torch.no_grad():
        expected = merged.eval()(PROMPT).logits
    convert(tmp_path / "base", tmp_path / "out", layers="1", kv_projection="layer", adapter=tmp_path / "adapter")
    logits = popcompile.load(tmp_path / "out")(PROMPT, prefill="full").logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_it_is_named(base: Path, tmp_path: Path, cli: Cli) -> None:
    save_adapter(base, tmp_path / "adapter", ADAPTERS["lora"])
    status, _, err = cli.run("convert", base, tmp_path / "out", "--layers", "1", "--adapter", tmp_path / "adapter")
    assert (status, err) == (0, "")
    source = json.loads((tmp_path / "out" / "popcompile.json").read_bytes())["source"]
    assert source["adapter"] == str(tmp_path / "adapter") and len(source["adapter_sha256"]) == 64
    assert f"{tmp_path / 'adapter'}, merged" in " ".join(inspect_text(tmp_path / "out").split())
    assert cli.run("inspect", tmp_path / "out", "--html", tmp_path / "report.html")[0] == 0
    html = (tmp_path / "report.html").read_text()
    assert f"popcompile analyze {base} --adapter {tmp_path / 'adapter'}" in html
    status, out, err = cli.run(
        "analyze", base, "--adapter", tmp_path / "adapter", "--texts", "2", "--tokens", "8", "--json"
    )
    assert (status, err) == (0, "")
    _, without, _ = cli.run("analyze", base, "--texts", "2", "--tokens", "8", "--json")
    assert json.loads(out)["layers"] != json.loads(without)["layers"]


# --- what is refused -------------------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def renamed(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): t for name, t in load_file(file).items()}, file)


def narrow(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: t[:, :-1].clone() if "lora_A" in name else t for name, t in load_file(file).items()}, file)


def unknown_part(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "lora_A" in n)
    save_file(tensors | {name.replace("lora_A", "lora_Z"): tensors[name].clone()}, file)


def config(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(content)

    return write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json; give a folder that PEFT"),
        (pickled, "only pickled weights, which popcompile never loads; save the adapter as safetensors"),
        (truncated, "adapter_model.safetensors is corrupt"),
        (renamed, "changes model.layers.7."),
        (narrow, "give the adapter's own model"),
        (unknown_part, "lora_Z.weight is unknown to PEFT"),
        (config("{"), "adapter_config.json is not JSON"),
        (config("{}"), "adapter_config.json names no peft_type"),
        (config('{"peft_type": "TELEPATHY"}'), "adapter_config.json is malformed"),
    ],
)
def test_refused(change: Callable[[Path], object], words: str, base: Path, cli: Cli, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", ADAPTERS["lora"])
    change(tmp_path / "adapter")
    line = cli.refuses("convert", base, tmp_path / "out", "--layers", "1", "--adapter", tmp_path / "adapter")
    assert f"--adapter {tmp_path / 'adapter'}" in line and words in line


def test_other_models_and_methods(base: Path, cli: Cli, tmp_path: Path) -> None:
    def refused(adapter: object, *options: object, model: Path = base) -> str:
        return cli.refuses("convert", model, tmp_path / "out", "--layers", "1", "--adapter", adapter, *options)

    save_adapter(base, tmp_path / "lora", ADAPTERS["lora"])
    wide = save_model(tmp_path / "wide", hidden_size=64)
    assert "does not fit" in refused(tmp_path / "lora", model=wide)
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    save_adapter(base, tmp_path / "head", LoraConfig(r=2, target_modules=["lm_head"]))
    assert "shares its weight with another layer" in refused(tmp_path / "head", model=tied)
    save_adapter(base, tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    assert "has nothing to merge into weights" in refused(tmp_path / "prompt")
    assert "no such folder or file" in refused(tmp_path / "none")
    assert "is a file; give the folder" in refused(tmp_path / "lora" / "adapter_config.json")
    assert "leave --random-weights out" in refused(tmp_path / "lora", "--random-weights")
    shutil.rmtree(tmp_path / "lora")
