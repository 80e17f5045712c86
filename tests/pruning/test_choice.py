"""Which layers are pruned: proposals, budgets, and what `convert` chooses for a tiny model and says about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from words import save_tiny, save_words

import popcompile
from popcompile.package.manifest import REPORT, read_manifest
from popcompile.package.report import REFERENCE_TOKENS, Loss, format_layers
from popcompile.passes.flops import REFERENCE_SIZES
from popcompile.pruning import execution
from popcompile.pruning.held_out import HeldOutKinds
from popcompile.pruning.search import Budget, Candidate, Search, first_candidate
from popcompile.report.inspection import inspect_text
from popcompile.runtime.verify import verify

LAYERS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice") / "model"
    save_tiny(folder, tiny_llama(vocab_size=128, num_hidden_layers=LAYERS, max_position_embeddings=96))
    return folder


def report_of(package: Path) -> dict[str, Any]:
    return json.loads((package / REPORT).read_text())


@pytest.fixture(scope="module")
def chosen(checkpoint: Path) -> Path:
    """A package whose layers popcompile chose, of 5 at most."""
    out = checkpoint.parent / "auto"
    popcompile.convert(checkpoint, out, window=24, max_kl=2.0, calibration_texts=24, refinement_steps=32)
    return out


# --- proposals and budgets -------------------------------------------------------------------------------------


def loss(kl: float, ratio: float) -> Loss:
    return Loss(kl, 0.0, 1.0, kl, 1.0, ratio)


@pytest.mark.parametrize(
    ("budget", "kl", "ratio", "spent"),
    [
        (Budget(max_kl=0.1), 0.05, 9.0, 0.5),
        (Budget(max_ppl_ratio=1.1), 9.0, 1.05, 0.5),
        (Budget(0.1, 1.1), 0.05, 1.2, 2.0),
        (Budget(max_kl=0.0), 1e-7, 1.0, 0.0),  # rounding
        (Budget(max_kl=0.0), 0.01, 1.0, float("inf")),
        (Budget(max_ppl_ratio=1.0), 0.0, 0.99, 0.0),
        (Budget(), 9.0, 9.0, 0.0),
    ],
)
def test_budgets(budget: Budget, kl: float, ratio: float, spent: float) -> None:
    assert budget.spent(loss(kl, ratio)) == pytest.approx(spent)


def test_no_loss_above_the_limit_is_allowed() -> None:
    for budget in (
        Budget(max_kl=0.0),
        Budget(max_kl=0.05),
        Budget(max_kl=0.0).widened(2),
        Budget(0.05, 1.1).widened(2),
    ):
        assert budget.allows(loss(budget.highest_kl, 1.0)) and not budget.allows(loss(budget.highest_kl * 1.01, 1.0))
    assert Budget(max_ppl_ratio=1.1).highest_kl == math.inf


class Canned(Search):
    """Searches among losses that are given: a KL for each layer, which add up, and what refinement leaves of them."""

    def __init__(self, costs: list[float], left: float = 1.0, first: int = 1) -> None:
        self.costs, self.left = costs, left
        self.asked, self.tried = list[list[int]](), list[int]()
        self.num_layers, self._held_out = len(costs), SimpleNamespace(first=first)
        self._states, self._steps, self._progress = object(), 1 if left < 1 else 0, lambda *_: None
        self._windows, self._speedup = (), None

    def measure(self, pruned: list[int], window: int | None = None, limit: float = math.inf) -> Candidate:
        self.asked.append(pruned)
        return Candidate(pruned, loss(sum(self.costs[layer] for layer in pruned), 1.0))

    def finish(self, pruned: list[int], window: int | None = None, refinable: Any = None) -> Candidate:
        self.tried.append(len(pruned))
        return Candidate(pruned, loss(sum(self.costs[layer] for layer in pruned) * self.left, 1.0), refined=True)


def test_layers_that_cost_much_are_kept_and_shallower_ones_skipped() -> None:
    """With a budget of 0.1 a layer may take 0.02; what was kept comes last, the cheapest first."""
    costs = [9.0, 9.0, 0.01, 0.03, 0.01, 0.01, 0.5, 0.01, 0.02, 0.0]
    search = Canned(costs)
    assert search.within(Budget(max_kl=0.101)).pruned == [2, 4, 5, 7, 8, 9]  # at most 6 of 10
    assert search.asked[0] == [9] and [6, 7, 8, 9] in search.asked
    assert all(len(pruned) <= 6 for pruned in search.asked) and not any(0 in pruned for pruned in search.asked)
    assert Canned(costs).within(Budget(max_kl=0.059)).pruned == [2, 4, 5, 7, 9]  # 8 takes more than 0.0118
    assert Canned(costs).within(Budget(max_kl=0.061)).pruned == [2, 4, 5, 7, 8, 9]  # and there is room for it
    assert Canned([1.0] * 9 + [0.0]).within(Budget(max_kl=0.1)).pruned == [9]
    assert Canned([0.0] * 10).within(Budget(max_kl=0.0)).pruned == [4, 5, 6, 7, 8, 9]


def test_the_cheapest_of_several_layers_that_cost_much_is_skipped() -> None:
    """Of all that were kept, also long before; what was tried on a smaller set is tried again first."""
    costs = [9.0, 9.0, 9.0, 9.0, 0.001, 0.001, 9.0, 0.04, 0.027, 0.03, 0.5, 0.0]
    search = Canned(costs)
    assert search.within(Budget(max_kl=0.1)).pruned == [4, 5, 7, 8, 9, 11]
    tried = [sorted(set(pruned) - {11}) for pruned in search.asked[1:]]
    assert tried[:5] == [[10], [9], [8], [7], [6, 8]]  # after four in a row, 8, which was the cheapest
    assert tried[-2:] == [[4, 5, 8, 9], [4, 5, 7, 8, 9]]  # the others again at the end, but for 10, 6, 3 and 2
    search = Canned([9.0, 9.0, 9.0, 9.0, 0.001, 0.001, 9.0, 9.0, 0.5, 0.4, 0.5, 0.0])
    assert search.within(Budget(max_kl=0.1)).pruned == [11] and len(search.asked) == 1 + 4
    # 9 costs more than a share, but less than four below it
    search = Canned([9.0, 9.0, 9.0, 9.0, 0.05, 0.05, 0.05, 0.05, 0.001, 0.03, 0.001, 0.0])
    assert search.within(Budget(max_kl=0.1)).pruned == [7, 8, 9, 10, 11]
    assert [8, 9, 10, 11] in search.asked and [4, 8, 10, 11] in search.asked


class CostlierOnAllText(Canned):
    """More than one layer costs something there."""

    def finish(self, pruned: list[int], window: int | None = None, refinable: Any = None) -> Candidate:
        return Candidate(pruned, loss(0.001 * (len(pruned) > 1), 1.0))


def test_a_budget_of_nothing() -> None:
    """What a part of the text called free may cost something on all of it."""
    assert CostlierOnAllText([0.0] * 10).within(Budget(max_kl=0.0)).pruned == [9]


def test_a_number_of_layers() -> None:
    costs = [9.0, 0.4, 0.01, 0.3, 0.01, 0.01, 0.5, 0.005, 0.01, 0.0]
    scale = Budget(max_kl=0.05)
    assert Canned(costs).best(3, scale).pruned == [7, 8, 9]
    assert Canned(costs).best(4, scale).pruned == [5, 7, 8, 9]
    assert Canned(costs).best(7, scale).pruned == [2, 3, 4, 5, 7, 8, 9]  # 3 was kept, and is the cheapest of those
    assert Canned(costs).best(9, scale).pruned == list(range(1, 10))


@pytest.mark.parametrize(("layers", "count", "first"), [(30, 18, 8), (30, 10, 16), (30, 2, 26), (6, 5, 1), (2, 1, 1)])
def test_the_first_layer_that_may_be_pruned(layers: int, count: int, first: int) -> None:
    assert first_candidate(layers, count) == first


def test_refinement_is_tried_where_it_may_suffice() -> None:
    """From the largest set down that may keep to the budget; what it left of one set's loss is what it is expected to
    leave of the others'.
    """
    costs = [9.0] * 4 + [0.018] * 15 + [0.0]
    search = Canned(costs, 0.75, first=4)  # 0.126 becomes 0.0945; 9 layers cost 0.144, of which 0.101 is left at best
    assert len(search.within(Budget(max_kl=0.1)).pruned) == 8 and search.tried == [8]
    search = Canned(costs, 0.85, first=4)
    assert len(search.within(Budget(max_kl=0.1)).pruned) == 7 and search.tried == [8, 7]
    search = Canned(costs, 0.95, first=4)  # then not 7, 0.103 of which would be left
    assert len(search.within(Budget(max_kl=0.1)).pruned) == 6 and search.tried == [8, 6]


class OfWindows(Canned):
    """A window of 64 loses what a layer is said to, one of 32 twice and one of 16 four times as much."""

    def __init__(self, costs: list[float], tokens: int) -> None:
        super().__init__(costs)
        self._windows = (32, 16)
        self._speedup = lambda pruned, window: 1 / (1 - len(pruned) / len(costs) * (1 - window / tokens))

    def measure(self, pruned: list[int], window: int | None = None, limit: float = math.inf) -> Candidate:
        window = window or 64
        return Candidate(pruned, loss(64 / window * sum(self.costs[layer] for layer in pruned), 1.0), window=window)

    def finish(self, pruned: list[int], window: int | None = None, refinable: Any = None) -> Candidate:
        self.tried.append(len(pruned))
        return self.measure(pruned, window)


@pytest.mark.parametrize(
    ("tokens", "budget", "chosen"),
    [
        (1024, 0.1, (6, 64)),  # a window of 16 would be 1.05 times sooner, and cost four times as much
        (256, 0.4, (6, 16)),
        (256, 0.15, (6, 32)),  # 0.2 with 16
        (256, 0.06, (6, 64)),
        (128, 0.06, (6, 64)),
        (128, 0.09, (5, 32)),
    ],
)
def test_a_smaller_window_where_the_prompts_gain_by_it(tokens: int, budget: float, chosen: tuple[int, int]) -> None:
    costs = [9.0] * 4 + [0.01] * 5 + [0.0]
    found = OfWindows(costs, tokens).within(Budget(max_kl=budget))
    assert (len(found.pruned), found.window) == chosen


# --- conversions -----------------------------------------------------------------------------------------------


def test_the_choice_is_the_largest_within_the_budget(chosen: Path) -> None:
    report, manifest = report_of(chosen), read_manifest(chosen)
    choice, quality = report["choice"], report["quality"]
    assert choice["how"] == "auto" and choice["budget"] == {"max_kl": 2.0, "max_ppl_ratio": None} and choice["met"]
    (picked,) = [row for row in choice["frontier"] if row["chosen"]]
    assert picked["pruned"] == manifest.pruned and manifest.kv_projection == "calibrated"
    assert not picked["refined"] and picked["loss"]["first_token_kl"] <= 2.0, "the closed form keeps to the budget"
    assert picked["loss"] != quality["loss"], "quality is measured on text that had no part in the choice"
    larger = [row for row in choice["frontier"] if len(row["pruned"]) > len(manifest.pruned)]
    assert all(row["loss"]["first_token_kl"] > 2.0 for row in larger)
    assert quality["texts"] == 12 and quality["prompt_tokens"] == 76 and quality["continuation_tokens"] == 20
    assert quality["own_projection"] != quality["loss"]
    assert len(verify(chosen)) == 4


def test_inspect_fits_a_terminal_of_80_columns(chosen: Path) -> None:
    text = inspect_text(chosen)
    assert not [line for line in text.splitlines() if len(line) > 80 and str(chosen.parent) not in line]
    (marked,) = [line.split() for line in text.splitlines() if line.endswith(" *")]
    pruned = read_manifest(chosen).pruned
    assert marked[:3] == [str(len(pruned)), format_layers(pruned), "24"]


def test_short_prompts_get_a_smaller_window(checkpoint: Path, chosen: Path, tmp_path: Path) -> None:
    """Of prompts of 48 tokens a window of 24 is half; of 96, all that the context has, a quarter."""
    few: dict[str, Any] = {"max_kl": 2.0, "calibration_texts": 24, "refinement_steps": 0}
    manifest = popcompile.convert(checkpoint, tmp_path / "short", prompt_tokens=48, **few)
    report = report_of(tmp_path / "short")
    (picked,) = [row for row in report["choice"]["frontier"] if row["chosen"]]
    assert manifest.window == picked["window"] == report["quality"]["window"] < 24
    assert report["choice"]["prompt_tokens"] == 48 and picked["loss"]["first_token_kl"] <= 2.0
    same = [row for row in report["choice"]["frontier"] if row["pruned"] == picked["pruned"] and row["window"] == 24]
    assert same and picked["speedup"] >= 1.05 * same[0]["speedup"]
    assert {row["window"] for row in report_of(chosen)["choice"]["frontier"]} == {24}, "it was given"
    count = popcompile.convert(checkpoint, tmp_path / "count", prompt_tokens=40, prune=2, kv_projection="layer")
    assert count.window == 20
    assert len(verify(tmp_path / "short")) == 4


def test_refinement_prunes_more_within_a_budget(checkpoint: Path, tmp_path: Path) -> None:
    """A budget between what two layers lose in closed form and refined, on text that repeats itself."""
    text = tmp_path / "words.txt"
    text.write_text("w3 w14 w15 w92 w65 " * 1000)
    few: dict[str, Any] = {"calibration": str(text), "calibration_texts": 24, "refinement_steps": 64}
    popcompile.convert(checkpoint, tmp_path / "two", prune=2, **few)
    rows = report_of(tmp_path / "two")["choice"]["frontier"]
    refined = next(row for row in rows if row["refined"])
    closed_form = next(row for row in rows if row["pruned"] == refined["pruned"] and not row["refined"])
    losses = [row["loss"]["first_token_kl"] for row in (refined, closed_form)]
    assert losses[0] < 0.99 * losses[1]
    budget = sum(losses) / 2
    more = popcompile.convert(checkpoint, tmp_path / "refined", max_kl=budget, **few)
    fewer = popcompile.convert(checkpoint, tmp_path / "not", max_kl=budget, **few | {"refinement_steps": 0})
    assert len(more.pruned) >= 2 > len(fewer.pruned)
    assert not any(row["refined"] for row in report_of(tmp_path / "not")["choice"]["frontier"])


def test_predicted_speedup_is_that_of_the_compiled_graph(tmp_path: Path) -> None:
    """At 1,024 tokens, the default and what the report counts for."""
    save_tiny(tmp_path / "model", tiny_llama(vocab_size=128, num_hidden_layers=4, max_position_embeddings=1024))
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1,3", calibration_texts=8, refinement_steps=0)
    report = report_of(tmp_path / "out")
    (picked,) = [row for row in report["choice"]["frontier"] if row["chosen"]]
    flops = report["flops"]
    assert report["choice"]["prompt_tokens"] == REFERENCE_TOKENS == REFERENCE_SIZES["prefill"]["sequence"]
    assert picked["window"] == 64
    assert picked["speedup"] == pytest.approx(flops["full_prefill_one_logit"] / flops["pop_prefill"], rel=0.005)


def test_the_same_seed_gives_the_same_package(checkpoint: Path, tmp_path: Path) -> None:
    def convert(name: str, seed: int) -> tuple[Any, Any]:
        manifest = popcompile.convert(
            checkpoint, tmp_path / name, layers="2,4-5", calibration_texts=16, refinement_steps=8, seed=seed
        )
        return manifest.files[manifest.weights]["sha256"], report_of(tmp_path / name)["quality"]

    assert convert("one", 3) == convert("two", 3)


def test_calibrated_package_beats_the_own_projections(checkpoint: Path, tmp_path: Path) -> None:
    manifest = popcompile.convert(
        checkpoint, tmp_path / "out", layers="2-3,5", window=1, dtype="fp16", refinement_steps=8
    )
    report = report_of(tmp_path / "out")
    assert report["choice"]["how"] == "layers" and report["choice"]["budget"] is None and manifest.pruned == [2, 3, 5]
    quality = report["quality"]
    assert quality["loss"]["first_token_kl"] < 0.8 * quality["own_projection"]["first_token_kl"]
    assert "importance" not in report
    names = {record["name"]: record for record in report["passes"]}
    assert names["InsertBypass"]["matches"] == 1
    assert len(verify(tmp_path / "out")) == 4


def test_nothing_is_decided_of_given_layers_without_refinement(checkpoint: Path, tmp_path: Path) -> None:
    """So no text is held out for it, and the text that measures is run once for both places in the report."""
    few: dict[str, Any] = {"layers": "3-5", "calibration_texts": 24}
    reports = {}
    for steps in (0, 8):
        popcompile.convert(checkpoint, tmp_path / f"{steps}", refinement_steps=steps, **few)
        reports[steps] = report_of(tmp_path / f"{steps}")
    quality, (only,) = reports[0]["quality"], reports[0]["choice"]["frontier"]
    assert only["loss"] == quality["loss"] != quality["own_projection"] and quality["texts"] == 3
    losses = [row["loss"] for row in reports[8]["choice"]["frontier"]]
    assert reports[8]["quality"]["loss"] not in losses and reports[8]["quality"]["texts"] == 12


def test_what_decides_may_be_rounded_and_what_is_reported_is_not(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with bf16 units: which layers are pruned, and what that costs, is as good as the same."""
    measure, allowed = HeldOutKinds.measure, list[bool]()

    def recorded(self: HeldOutKinds, *args: Any) -> Loss:
        allowed.append(torch.get_float32_matmul_precision() == "medium")
        return measure(self, *args)

    monkeypatch.setattr(HeldOutKinds, "measure", recorded)
    monkeypatch.setattr(execution, "rounds_in_avx512", lambda: rounded)
    found = {}
    for rounded in (False, True):
        allowed.clear()
        few: dict[str, Any] = {"prune": 2, "calibration_texts": 24, "refinement_steps": 0}
        manifest = popcompile.convert(checkpoint, tmp_path / f"{rounded}", **few)
        assert allowed[:-2] and all(allowed[:-2]) and not any(allowed[-2:])
        (decided,) = [row for row in report_of(tmp_path / f"{rounded}")["choice"]["frontier"] if row["chosen"]]
        reported = report_of(tmp_path / f"{rounded}")["quality"]["loss"]
        found[rounded] = manifest.pruned, decided["loss"]["kl"], reported["kl"]
    assert found[True][0] == found[False][0] and found[True][1:] != found[False][1:]
    assert found[True][1:] == pytest.approx(found[False][1:], rel=0.1)


def test_a_count_is_chosen_by_loss(checkpoint: Path, tmp_path: Path) -> None:
    manifest = popcompile.convert(checkpoint, tmp_path / "out", prune=3, calibration_texts=24, refinement_steps=8)
    frontier = report_of(tmp_path / "out")["choice"]["frontier"]
    (chosen,) = [row for row in frontier if row["chosen"]]
    assert chosen["pruned"] == manifest.pruned and len(manifest.pruned) == 3 and LAYERS - 1 in manifest.pruned
    smaller = [row["pruned"] for row in frontier if len(row["pruned"]) < 3]
    assert [LAYERS - 1] in smaller
    assert any(len(pruned) == 2 and set(pruned) < set(manifest.pruned) for pruned in smaller)


def test_a_budget_that_nothing_meets(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from popcompile.cli import main

    out = tmp_path / "out"
    assert main(["convert", str(checkpoint), str(out), "--max-kl", "0", "--calibration-texts", "16"]) == 0
    shown = capsys.readouterr()
    assert "no pruning meets the budget (--max-kl 0)" in shown.err and shown.err.count("\n") == 1
    assert read_manifest(out).pruned == [LAYERS - 1] and not report_of(out)["choice"]["met"]
    assert report_of(out)["quality"]["loss"]["first_token_kl"] < 1e-5


def test_without_calibration_the_own_projections_are_measured(checkpoint: Path, tmp_path: Path) -> None:
    manifest = popcompile.convert(checkpoint, tmp_path / "out", kv_projection="layer", max_kl=2.0)
    report = report_of(tmp_path / "out")
    assert manifest.kv_projection == "layer"
    assert report["quality"]["loss"] == report["quality"]["own_projection"]


def test_calibration_on_a_file(checkpoint: Path, tmp_path: Path) -> None:
    text = save_words(tmp_path / "words.txt", 3, 96 * 14)
    popcompile.convert(checkpoint, tmp_path / "out", layers="3-5", calibration=str(text), refinement_steps=8)
    quality = report_of(tmp_path / "out")["quality"]
    assert quality["text"] == "held-out part of words.txt" and 1 <= quality["texts"] <= 4


def test_layers_that_cost_nothing_need_no_text(checkpoint: Path, tmp_path: Path) -> None:
    steps = set()
    popcompile.convert(checkpoint, tmp_path / "out", prune=1, progress=lambda step, *_: steps.add(step))
    assert not steps & {"sample", "analyze", "calibrate", "choose"}
    assert read_manifest(tmp_path / "out").kv_projection == "layer" and "quality" not in report_of(tmp_path / "out")


def test_pruned_prefill_answers_as_measured(chosen: Path) -> None:
    """The package's first-token KL on random prompts is of the size that the report says."""
    model = popcompile.load(chosen)
    random = torch.Generator().manual_seed(5)
    found = []
    for _ in range(12):
        ids = torch.randint(128, (1, 60), generator=random)
        full, pop = (model(ids, prefill=how, logits_to_keep=1).logits[0, -1].log_softmax(-1) for how in ("full", "pop"))
        found.append(float((full.exp() * (full - pop)).sum()))
    assert 0 < sum(found) / len(found) < 4 * report_of(chosen)["quality"]["loss"]["first_token_kl"]
