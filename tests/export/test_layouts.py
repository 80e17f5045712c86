"""The unified layout: one graph, which is pruned prefill for a prompt and the whole model for a token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli
from torch import Tensor

import popcompile
from popcompile.errors import PopcompileError
from popcompile.evaluation.compare import evaluate
from popcompile.package.manifest import read_manifest
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.verify import verify


@pytest.fixture(scope="module")
def unified(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny package's model and layers in the other layout."""
    out = tmp_path_factory.mktemp("unified") / "out"
    popcompile.convert(tiny_checkpoint, out, prune=1, layout="unified")
    return out


def prompts(*lengths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, 100, (n,), generator=random) for n in lengths]


def test_files(unified: Path, tiny_package: Path) -> None:
    manifest, split = read_manifest(unified), read_manifest(tiny_package)
    assert (manifest.layout, manifest.graphs, manifest.weights) == (
        "unified", {"prefill": "model.onnx"}, "model.onnx_data",
    )  # fmt: skip
    names = {path.name for path in unified.iterdir()}
    assert {"model.onnx", "model.onnx_data"} <= names and not {"prefill.onnx", "decode.onnx"} & names
    assert "sample_sha256" in manifest.files["model.onnx_data"]
    same = {"prefill.onnx": "model.onnx", "weights.onnx.data": "model.onnx_data"}
    sizes = {split.files[ours]["size"] == manifest.files[theirs]["size"] for ours, theirs in same.items()}
    assert sizes == {False, True}  # the graph names its data file; the weights are the same
    decoder = json.loads((unified / "genai_config.json").read_text())["model"]
    assert (decoder["type"], decoder["decoder"]["filename"]) == ("llama", "model.onnx")
    assert "pipeline" not in decoder["decoder"]


def test_files_with_images(unified_vision_package: Path, vision_package: Path) -> None:
    """Under transformers.js's names, and the table of embeddings, which three graphs read, once."""
    manifest, split = read_manifest(unified_vision_package), read_manifest(vision_package)
    assert (manifest.stages, manifest.graphs) == (["prefill"], {
        "prefill": "decoder_model_merged.onnx", "vision": "vision_encoder.onnx", "embedding": "embedding.onnx",
        "text_embedding": "embed_tokens.onnx",
    })  # fmt: skip
    assert split.graphs.keys() - {"decode"} == manifest.graphs.keys() - {"text_embedding"}
    assert manifest.weights == "decoder_model_merged.onnx_data"
    assert manifest.files[manifest.weights]["sha256"] == split.files[split.weights]["sha256"]


@pytest.mark.parametrize("lengths", [[1], [20], [12, 5], [1, 1, 1]])
def test_same_numbers_as_the_split_layout(lengths: list[int], unified: Path, tiny_package: Path) -> None:
    """Prompts, tokens after them, and a second prompt after those: bit for bit."""
    found = []
    for package in (unified, tiny_package):
        runtime = popcompile.load(package, prefill="pop").runtime
        cache = runtime.new_cache(len(lengths))
        counts = [lengths, *([n] * len(lengths) for n in (1, 1, 7))]
        logits = [runtime.feed(prompts(*new), cache, "prefill") for new in counts]
        found.append([*logits, *(t[i, :, :n] for t in cache.tensors() for i, n in enumerate(cache.lengths))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def generated(model: PopForCausalLM, ids: Tensor) -> Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False)


def test_generates_with_pruned_prefill_of_any_length(unified: Path, tiny_package: Path) -> None:
    """Short prompts too: there is no full prefill to choose."""
    for length in (3, 30):
        ids = prompts(length)[0][None]
        expected = generated(popcompile.load(tiny_package, prefill="pop"), ids)
        for prefill in ("pop", "auto"):
            assert torch.equal(generated(popcompile.load(unified, prefill=prefill), ids), expected)


def test_has_no_full_model(unified: Path, cli: Cli) -> None:
    message = "has no graph of the full model, for it has the unified layout; convert with --layout split"
    with pytest.raises(PopcompileError, match=message):
        popcompile.load(unified, prefill="full")
    with pytest.raises(PopcompileError, match=message):
        popcompile.load(unified)(prompts(4)[0][None])
    assert message in cli.refuses("run", unified, "--prompt", "a", "--prefill", "full", "--raw")


def test_verify(unified: Path) -> None:
    assert [check["check"] for check in verify(unified)] == ["files", "graphs", "configs", "numbers"]


def test_evaluate_compiles_the_full_model(unified: Path, tiny_package: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"word{(i * j) % 17} and" for i in range(60)) for j in range(4)))
    numbers = {"prompts": 2, "prompt_tokens": 20, "continuation_tokens": 5, "greedy_prompts": 1, "baselines": True}
    ours, theirs = (evaluate(package, [text], **numbers) for package in (unified, tiny_package))
    for result in (ours, theirs):
        for name in ("package", "seconds"):
            del result[name]
    assert ours == theirs
    assert ours["texts"][str(text)]["first_token_kl_mean"]["value"] > 0


@pytest.mark.parametrize(("layout", "loads"), [("unified", True), ("split", False)])
def test_inspect_tells_which_runtimes_load_it(
    layout: str, loads: bool, unified: Path, tiny_package: Path, cli: Cli
) -> None:
    package = unified if layout == "unified" else tiny_package
    known = {r["runtime"]: r for r in json.loads(cli.run("inspect", package, "--json")[1])["runtimes"]}
    assert known["optimum"]["loads"] is known["transformers.js"]["loads"] is loads
    assert known["onnxruntime-genai"]["loads"]
    text = " ".join(cli.run("inspect", package)[1].split())
    assert ("convert with --layout unified" in text) is not loads
