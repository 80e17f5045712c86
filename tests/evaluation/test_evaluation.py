"""`popcompile evaluate`: every number against transformers' modules and the reference prefill, and what it leaves."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import snapshot
from conftest import tiny_llama
from expected_metrics import TOLERANCE, assert_metrics, metrics_of
from reference import pop_prefill, without_layers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from words import save_tiny, save_words

import popcompile.evaluation.encoders
from popcompile.cli import main
from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.evaluation.bootstrap import estimate
from popcompile.evaluation.compare import evaluate
from popcompile.evaluation.questions import questions
from popcompile.package.manifest import LAYOUTS, MANIFEST, REPORT, describe_files, read_manifest
from popcompile.package.saving import save_in_report
from popcompile.report.evaluation import evaluation_text
from popcompile.report.inspection import inspect_text
from popcompile.runtime.session import Runtime
from popcompile.runtime.verify import verify
from popcompile.text.documents import default_texts, read_texts, windows
from popcompile.variants import Variants

WEIGHTS = LAYOUTS["split"].weights

PRUNED, WINDOW = [1, 2], 3
SIZES: dict[str, Any] = {"prompts": 3, "prompt_tokens": 20, "continuation_tokens": 7}
SIZES |= {"greedy_prompts": 2, "greedy_tokens": 6}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model of four layers and its package."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_llama(vocab_size=128, num_hidden_layers=4, max_position_embeddings=64)
    model = save_tiny(folder / "model", config)
    convert(folder / "model", folder / "out", layers="1,2", kv_projection="layer", window=WINDOW)
    return model, folder / "out"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [save_words(folder / "one.txt", 1), save_words(folder / "two.txt", 2)]


# --- numbers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(
    model: PreTrainedModel, text: Tensor, prompt: int, pruned: list[int], window: int = WINDOW
) -> tuple[Tensor, DynamicCache]:
    """Logits [tokens, vocabulary] that predict what follows the prompt, and the cache after the prompt."""
    first, cache = pop_prefill(model, text[None, :prompt], pruned, window=window)
    grown = copy.deepcopy(cache)
    after = model(input_ids=text[None, prompt:-1], past_key_values=grown, use_cache=True).logits
    return torch.cat((first, after), dim=1)[0], cache


@torch.no_grad()
def greedy(model: PreTrainedModel, first: Tensor, cache: DynamicCache, count: int) -> list[int]:
    tokens = [int(first.argmax())]
    while len(tokens) < count:
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


@pytest.fixture(scope="module")
def measured(tiny: tuple[PreTrainedModel, Path], files: list[Path]) -> dict[str, Any]:
    return evaluate(tiny[1], files, seed=5, baselines=True, **SIZES)


def test_every_number_of_a_tiny_model(
    tiny: tuple[PreTrainedModel, Path], files: list[Path], measured: dict[str, Any]
) -> None:
    (model, package), result = tiny, measured
    prompt = SIZES["prompt_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(package)
    everything: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in ("pop", "dropped", "none")}
    for path in files:
        found = windows(tokenizer, read_texts(path), 3, prompt + 7, 5, str(path))
        answers = [w[prompt:] for w in found]
        full, pop, agreed = [], [], []
        for index, window in enumerate(found):
            logits, cache = predictions(model, window, prompt, [])
            full.append(logits)
            pruned_logits, pruned_cache = predictions(model, window, prompt, PRUNED)
            pop.append(pruned_logits)
            if index < 2:
                one = greedy(model, logits[0], cache, 6)
                other = greedy(model, pruned_logits[0], pruned_cache, 6)
                agreed.append(next((i for i in range(6) if one[i] != other[i]), 6))
        with torch.no_grad():
            smaller = without_layers(model, PRUNED)
            dropped = [smaller(w[None]).logits[0, prompt - 1 : -1] for w in found]
        assert result["texts"][str(path)]["prompts"] == 3
        assert_metrics(result["texts"][str(path)], metrics_of(full, pop, answers))
        assert_metrics(result["baselines"]["dropped"][str(path)], metrics_of(full, dropped, answers))
        assert_metrics(result["baselines"]["none"][str(path)], metrics_of(full, full, answers))
        greedy_found = result["texts"][str(path)]["greedy_agreement_tokens"]
        assert (greedy_found["value"], greedy_found["prompts"]) == (np.mean(agreed), 2)
        for name, logits_of in (("pop", pop), ("dropped", dropped), ("none", full)):
            for held, new in zip(everything[name], (full, logits_of, answers), strict=True):
                held += new
    assert set(result["baselines"]) == {"none", "dropped"}  # the package has the layers' own projection itself
    assert_metrics(result["texts"]["all"], metrics_of(*everything["pop"]))
    assert_metrics(result["baselines"]["dropped"]["all"], metrics_of(*everything["dropped"]))
    assert result["texts"]["all"]["prompts"] == 6
    assert result["texts"]["all"]["first_token_kl_mean"]["value"] > 0.1  # the comparison sees the pruned layers


@pytest.mark.real
def test_numbers_of_a_real_model(smollm2_package: Path, smollm2_checkpoint: Path) -> None:
    manifest = read_manifest(smollm2_package)
    prompt, after, pruned = 64, 16, manifest.pruned
    sizes: dict[str, Any] = {"prompts": 1, "prompt_tokens": prompt, "continuation_tokens": after, "greedy_prompts": 0}
    result = evaluate(smollm2_package, seed=1, retrieval_prompts=5, **sizes)
    model = AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    for name, documents in default_texts().items():
        found = windows(tokenizer, documents, 1, prompt + after, 1, name)
        with torch.no_grad():
            full = [model(w[None]).logits[0, prompt - 1 : -1] for w in found]
        pop = [predictions(model, w, prompt, pruned, manifest.window)[0] for w in found]
        assert_metrics(result["texts"][name], metrics_of(full, pop, [w[prompt:] for w in found]), 5e-3)
        assert "greedy_agreement_tokens" not in result["texts"][name]
    assert result["retrieval"] == _expected_retrieval(model, tokenizer, prompt, pruned, manifest.window)
    # DESIGN section 2: with a third pruned a first token loses 0.3 nats and a perplexity a tenth to a fifth
    assert 0.01 < result["texts"]["prose"]["first_token_kl_mean"]["value"] < 3
    assert 0.7 < result["texts"]["prose"]["perplexity_ratio"]["value"] < 2.5


def _expected_retrieval(
    model: PreTrainedModel, tokenizer: Any, prompt: int, pruned: list[int], window: int
) -> dict[str, Any]:
    """By transformers: whether greedy decoding writes the answer, after a full and after a pruned prefill."""
    found = {}
    asked = questions(tokenizer, default_texts()["prose"], 5, prompt, seed=1)
    for kind in ("list", "passage"):
        rows = []
        for question in (q for q in asked if q.kind == kind):
            row = []
            for layers in ([], pruned):
                logits, cache = pop_prefill(model, question.prompt[None], layers, window=window)
                row.append(greedy(model, logits, cache, len(question.answer)) == question.answer.tolist())
            rows.append(row)
        full, pop = ([float(row[i]) for row in rows] for i in (0, 1))
        kept = [row[1] for row in rows if row[0]]
        assert kept  # the model does find some
        estimates = {
            "reference": estimate(lambda x: x.mean(-1), full, 1),
            "pop": estimate(lambda x: x.mean(-1), pop, 1),
        }
        found[kind] = {
            "prompts": len(rows),
            "answered": estimates,
            "kept": estimate(lambda x: x.mean(-1), list(map(float, kept)), 1) | {"prompts": len(kept)},
        }
    return found


def test_nothing_pruned_costs_nothing(tiny: tuple[PreTrainedModel, Path], files: list[Path], tmp_path: Path) -> None:
    convert(tiny[1].parent / "model", tmp_path / "out", prune=0)
    result = evaluate(tmp_path / "out", files[:1], **SIZES)
    (metrics,) = result["texts"].values()
    assert metrics["first_token_kl_p95"]["value"] < 1e-6
    assert metrics["top1_agreement"]["value"] == 1
    assert metrics["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-5)
    assert metrics["greedy_agreement_tokens"]["value"] == 6
    with pytest.raises(PopcompileError, match="nothing is pruned"):
        evaluate(tmp_path / "out", files[:1], baselines=True, **SIZES)


def test_one_prompt_has_no_interval_and_the_seed_decides(tiny: tuple[PreTrainedModel, Path], files: list[Path]) -> None:
    sizes: dict[str, Any] = SIZES | {"prompts": 1}
    results = [evaluate(tiny[1], files[:1], seed=seed, **sizes)["texts"] for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    (metrics,) = results[0].values()
    assert metrics["perplexity_ratio"]["low"] is None is metrics["perplexity_ratio"]["high"]


def test_smallest_sizes(tiny: tuple[PreTrainedModel, Path], files: list[Path]) -> None:
    """A prompt of one token more than the window, and one after it; the largest that the context has room for."""
    for prompt in (1, WINDOW):
        with pytest.raises(PopcompileError, match=f"--prompt-tokens {prompt}: .* up to 3 tokens in full"):
            evaluate(tiny[1], files[:1], prompt_tokens=prompt, continuation_tokens=1)
    result = evaluate(tiny[1], files[:1], prompts=2, prompt_tokens=WINDOW + 1, continuation_tokens=1)
    (metrics,) = result["texts"].values()
    assert metrics["first_token_kl_mean"]["value"] > 0 and "continuation_kl_mean" not in metrics
    assert "tokens after it" not in evaluation_text(result)
    assert result["retrieval"] == {}  # the tiny tokenizer has no words
    whole = evaluate(tiny[1], files[:1], prompts=2, prompt_tokens=57, continuation_tokens=7, greedy_tokens=32)
    assert whole["settings"]["greedy_tokens"] == 7  # what the context of 64 leaves


# --- variants --------------------------------------------------------------------------------------------------


def test_a_variant_with_other_layers_pruned(tiny: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, package = tiny
    before = snapshot(package)
    runtime = Runtime(Variants(package).prune(tmp_path / "out", [3, 0]))
    ids = torch.randint(128, (1, 30), generator=torch.Generator().manual_seed(0))
    logits = runtime.feed([ids[0]], runtime.new_cache(1), "prefill")
    torch.testing.assert_close(logits, pop_prefill(model, ids, [0, 3], window=WINDOW)[0], atol=TOLERANCE, rtol=0)
    assert read_manifest(runtime.folder).pruned == [0, 3]
    assert len(verify(runtime.folder)) == 4
    assert snapshot(package) == before


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_variant_without_layers_goes_on_after_a_prompt(
    tiny: tuple[PreTrainedModel, Path], tmp_path: Path, tokens: int
) -> None:
    """By one token and by several: the entries of dropped layers, which nothing reads, keep to their place as well."""
    model, package = tiny
    runtime = Runtime(Variants(package).drop(tmp_path / "out", PRUNED))
    ids = torch.randint(128, (30,), generator=torch.Generator().manual_seed(0))
    cache = runtime.new_cache(1)
    runtime.feed([ids[:20]], cache, "prefill")
    for part in ids[20:].split(tokens):
        logits = runtime.feed([part], cache, "decode")
    with torch.no_grad():
        expected = without_layers(model, PRUNED)(ids[None]).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_baselines_of_another_projection_in_fp16(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that says it has another projection gets the layers' own as a baseline, here the same graph."""
    save_tiny(tmp_path / "model", tiny_llama(vocab_size=128, max_position_embeddings=64))
    package = tmp_path / "out"
    manifest = convert(tmp_path / "model", package, prune=1, dtype="fp16")
    (package / MANIFEST).write_text(replace(manifest, kv_projection="calibrated").to_json())
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = snapshot(package)
    result = evaluate(package, files[:1], baselines=True, **SIZES)
    assert list(result["baselines"]) == ["none", "dropped", "layer"]
    (metrics,), (layer,) = result["texts"].values(), result["baselines"]["layer"].values()
    assert layer["first_token_kl_mean"] == metrics["first_token_kl_mean"]
    assert snapshot(package) == before
    assert not list((tmp_path / "temporary").iterdir())


def test_another_package_as_the_reference(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of int4: what pruning and rounding cost together, and rounding alone."""
    save_tiny(tmp_path / "model", tiny_llama(vocab_size=128, max_position_embeddings=64, num_hidden_layers=3))
    packages = {}
    for dtype in ("fp32", "int4"):
        packages[dtype] = tmp_path / dtype
        convert(tmp_path / "model", packages[dtype], layers="1", kv_projection="layer", dtype=dtype)
    alone = {dtype: next(iter(evaluate(p, files[:1], **SIZES)["texts"].values())) for dtype, p in packages.items()}
    result = evaluate(packages["int4"], files[:1], reference=packages["fp32"], **SIZES)
    assert result["reference"] == str(packages["fp32"]) and list(result["baselines"]) == ["none", "full"]
    (both,), (rounded,) = result["texts"].values(), result["baselines"]["full"].values()
    assert both["full_perplexity"] == alone["fp32"]["full_perplexity"]
    assert both["pop_perplexity"] == alone["int4"]["pop_perplexity"]
    assert rounded["pop_perplexity"]["value"] == pytest.approx(alone["int4"]["full_perplexity"]["value"], rel=1e-6)
    assert 0 < rounded["first_token_kl_mean"]["value"] != both["first_token_kl_mean"]["value"]
    text = evaluation_text(result)
    assert f"against {packages['fp32']}'s full model" in text and "this package, nothing pruned" in text
    itself = evaluate(packages["fp32"], files[:1], reference=packages["fp32"], **SIZES)
    assert next(iter(itself["texts"].values())) == alone["fp32"]
    monkeypatch.setattr(popcompile.evaluation.encoders, "Runtime", partial(Runtime, low_memory=True))
    (mapped,) = evaluate(packages["int4"], files[:1], reference=packages["fp32"], **SIZES)["baselines"]["full"].values()
    assert mapped["first_token_kl_mean"] != rounded["first_token_kl_mean"]  # packed kernels round activations too


def test_a_reference_of_another_model(tiny: tuple[PreTrainedModel, Path], files: list[Path], tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", tiny_llama(vocab_size=160, max_position_embeddings=64))
    convert(tmp_path / "model", tmp_path / "other", prune=1, kv_projection="layer")
    with pytest.raises(PopcompileError, match=r"it is another model .*, a vocabulary of 160.*; give a package of"):
        evaluate(tiny[1], files[:1], reference=tmp_path / "other", **SIZES)


def test_weights_that_compute_nan(tiny: tuple[PreTrainedModel, Path], files: list[Path], tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny[1], tmp_path / "out"))
    manifest = read_manifest(package)
    (package / MANIFEST).unlink()  # the manifest describes every other file
    (package / WEIGHTS).write_bytes(b"\xff" * (package / WEIGHTS).stat().st_size)
    (package / MANIFEST).write_text(replace(manifest, files=describe_files(package, WEIGHTS)).to_json())
    with pytest.raises(PopcompileError, match="NaN or infinity"):
        evaluate(package, files[:1], **SIZES)


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(files: list[Path]) -> list[str]:
    sizes = ["--prompts", "3", "--prompt-tokens", "20", "--continuation-tokens", "7", "--greedy-prompts", "0"]
    return [*sizes, "--text", *map(str, files)]


def test_tables(
    tiny: tuple[PreTrainedModel, Path],
    arguments: list[str],
    measured: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evaluate", str(tiny[1]), *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "greedy" not in out and "dropped" not in out
    assert "prefill skips 1-2, layer projection" in out and "3 of " in out and "prompts of 20 tokens and 7 after" in out
    with_baselines = evaluation_text(measured)
    for words in ("first token, KL mean (nats)", "same top-1", "perplexity, pop / full"):
        assert words in out and words in with_baselines
    assert "greedy tokens until they differ (of 6)" in with_baselines and "dropped in prefill and" in with_baselines
    rows = [line.split() for line in with_baselines.splitlines() if "nothing pruned" in line]
    assert len(rows) == 3 and all(row[3:5] == ["0.000", "0.000"] for row in rows)


def test_saving(
    tiny: tuple[PreTrainedModel, Path], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Path(shutil.copytree(tiny[1], tmp_path / "out"))
    (package / "notes").mkdir()
    (package / "notes" / "mine.md").write_text("keep this")
    (tmp_path / "link").symlink_to("out")
    before, runtime = snapshot(package), Runtime(package)
    converted = json.loads((package / REPORT).read_text())
    for where, seed in ((package, "1"), (tmp_path / "link", "2")):
        assert main(["evaluate", str(where), *arguments, "--seed", seed, "--save", "--json"]) == 0
        out, err = capsys.readouterr()
        printed = json.loads(out)
        assert err == "" and printed["settings"]["seed"] == int(seed)
        after = snapshot(package)
        assert {name for name in after if after[name] != before.get(name)} == {REPORT, MANIFEST}
        assert set(after) == set(before)
        report = json.loads((package / REPORT).read_text())
        assert report.pop("evaluation") == printed
        assert report == converted
        assert len(verify(package)) == 4 and "PrunePrefill" in inspect_text(package)
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "out"]
    runtime.feed([torch.arange(9)], runtime.new_cache(1), "prefill")  # what had loaded the package goes on


def test_a_failure_while_saving_changes_nothing(
    tiny: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(shutil.copytree(tiny[1], tmp_path / "out"))
    manifest = read_manifest(package)
    before = snapshot(tmp_path)
    with pytest.raises(TypeError):  # after the copy, before the rename
        save_in_report(package, manifest, "evaluation", {"not JSON": object()})
    assert snapshot(tmp_path) == before
    with pytest.raises(PopcompileError, match="was replaced meanwhile"):
        save_in_report(package, replace(manifest, pruned=[0]), "evaluation", {})
    monkeypatch.setattr(os, "link", _no_links)
    save_in_report(package, manifest, "evaluation", {"fine": 1})
    assert json.loads((package / REPORT).read_text())["evaluation"] == {"fine": 1}
    assert len(verify(package)) == 4


def _no_links(*_: object, **__: object) -> None:
    raise OSError("this file system has no hard links")
