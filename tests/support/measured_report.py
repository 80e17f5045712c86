"""Sections of a report.json, made up: everything that can be measured of a package of four layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from popcompile.evaluation.summaries import PromptScores, summarise
from popcompile.package.manifest import MANIFEST, read_manifest
from popcompile.package.saving import save_in_report

#: what a benchmark times of prompts without images
MEASURES = ("prefill", "time_to_first_token", "decode")


def loss(kl: float) -> dict[str, float]:
    return {
        "first_token_kl": kl, "first_token_kl_error": kl / 10, "first_token_agreement": 1 - kl / 2, "kl": kl / 2,
        "agreement": 1 - kl / 4, "ppl_ratio": 1 + kl,
    }  # fmt: skip


def candidate(pruned: list[int], kl: float, chosen: bool = False) -> dict[str, Any]:
    speedup = 1 / (1 - len(pruned) / 8)
    return {"pruned": pruned, "window": 16, "speedup": speedup, "loss": loss(kl), "chosen": chosen}


def evaluation() -> dict[str, Any]:
    scores = [PromptScores(first_kl=x, later_kl=x, agreement=0.75, full_nll=2, nll=2 + x) for x in (0.1, 0.3)]
    texts = {"notes <1>": summarise(scores, seed=0)}
    share = {"value": 0.5, "low": 0.0, "high": 1.0}
    return {
        "package": "out", "pruned": [2, 3], "kv_projection": "layer", "texts": texts, "seconds": 1.0,
        "settings": {"prompts": 2, "prompt_tokens": 8, "continuation_tokens": 4, "greedy_tokens": 0},
        "baselines": {"none": texts, "dropped": texts},
        "retrieval": {"list": {"prompts": 2, "answered": {"reference": share, "dropped": share, "pop": share}}},
        "code": {"problems": 4, "pass_at_1": {"reference": share, "pop": share}, "difference": share},
    }  # fmt: skip


def evaluation_images() -> dict[str, Any]:
    """Of two questions about one picture."""
    share = {"value": 0.5, "low": 0.0, "high": 1.0}
    result = evaluation() | {"pictures": 1, "tokens": [300, 1400], "image_tokens": [256, 256]}
    result["answers"] = {"prompts": 2, "answered": {"reference": share, "dropped": share, "pop": share}, "kept": share}
    return {name: value for name, value in result.items() if name not in ("retrieval", "code")}


def benchmark(images: list[list[int]]) -> dict[str, Any]:
    """The full model takes one and a half times as long. images: rows and columns of each; vision takes 100 ms."""
    subjects = []
    for name, times in (("pop", 1.0), ("full", 1.5)):
        lengths = []
        for tokens in (256, 1024):
            second = {"median": tokens * times / 1000, "half_spread": 0.02, "tokens_per_second": 1000 / times}
            turn = second | {"seconds": [second["median"]]}
            seen = {"vision": turn | {"median": 0.1, "half_spread": 0.01}} if images else {}
            lengths.append({"tokens": tokens, **dict.fromkeys(MEASURES, turn), **seen})
        memory = {"anonymous": 10**9, "peak": None}
        subjects.append({"name": name, "kind": "package", "load_seconds": 1.0, "memory": memory, "lengths": lengths})
    ratios = [{"tokens": n, "over": "full", **dict.fromkeys(MEASURES, 1.5)} for n in (256, 1024)]
    settings = {
        "lengths": [256, 1024], "batch": 1, "decode_tokens": 4, "repeats": 3, "threads": 2, "provider": "cpu",
        "runtime": "popcompile", "seed": 0, "images": images,
    }  # fmt: skip
    return {
        "package": "out", "pruned": [2, 3], "num_layers": 4, "dtype": "fp32", "source": "m", "settings": settings,
        "versions": {"onnxruntime": "1.31"}, "cpu": "CPU <1>", "gpu": None, "subjects": subjects, "ratios": ratios,
        "warnings": [], "seconds": 9.0,
    }  # fmt: skip


def measured() -> dict[str, Any]:
    """Every optional section."""
    rows = [
        {"layer": i, "prefill": 1 / (i + 1), "decode": 0.5, "prefill_error": 0.01, "decode_error": None}
        for i in range(4)
    ]
    frontier = [
        candidate([3], 0.0), candidate([2], 0.3), candidate([2, 3], 0.125, chosen=True), candidate([1, 3], 0.2),
        candidate([1, 2, 3], 2.5),
    ]  # fmt: skip
    tasks = {"hellaswag": {"acc,none": 0.4, "acc_stderr,none": 0.1}}
    return {
        "importance": {"texts": 6, "tokens": 32, "layers": rows},
        "choice": {
            "how": "auto", "budget": {"max_kl": 0.15, "max_ppl_ratio": None}, "met": True, "frontier": frontier,
        },
        "quality": {
            "text": "sampled from the model itself", "texts": 6, "prompt_tokens": 24, "continuation_tokens": 8,
            "loss": loss(0.125), "own_projection": loss(0.5),
        },
        "evaluation": evaluation(),
        "evaluation_images": evaluation_images(),
        "benchmark": benchmark([]),
        "benchmark_images": benchmark([[16, 16], [8, 16]]),
        "evaluation_tasks": {"package": "out", "tasks": {"full": tasks, "pop": tasks}, "versions": {"lm_eval": "0.4"}},
    }  # fmt: skip


def save(package: Path, sections: dict[str, Any], **changes: Any) -> Path:
    """Put sections into the package's report, and `changes` into its manifest."""
    for key, content in sections.items():
        save_in_report(package, read_manifest(package), key, content)
    if changes:
        manifest = dataclasses.replace(read_manifest(package), **changes)
        (package / MANIFEST).unlink()
        (package / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return package
