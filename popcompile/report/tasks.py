"""Tasks of lm-evaluation-harness as a table."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate


def tasks_text(result: dict[str, Any]) -> str:
    """The result of evaluation.harness.run_tasks for a terminal."""
    headers, rows = task_rows(result)
    head = f"{result['package']}: lm-evaluation-harness {result['versions']['lm_eval']}, ± standard error"
    return f"{head}\n\n" + tabulate(rows, headers, disable_numparse=True)


def task_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per task and metric."""
    rows = []
    full, pop = (result["tasks"][prefill] for prefill in ("full", "pop"))
    for task, metrics in full.items():
        for metric in metrics:
            name, _, kind = metric.partition(",")
            if not name.endswith("_stderr") and name != "sample_len":
                cells = [_cell(found[task], name, kind) for found in (full, pop)]
                rows.append([task, name if kind in ("", "none") else f"{name} ({kind})", *cells])
    return ["task", "metric", "full", "pop"], rows


def _cell(metrics: dict[str, Any], name: str, kind: str) -> str:
    error = metrics.get(f"{name}_stderr,{kind}")
    return f"{metrics[f'{name},{kind}' if kind else name]:.4f}" + (
        f" ± {error:.4f}" if isinstance(error, int | float) else ""
    )
