"""EleutherAI's lm-evaluation-harness on a package: its tasks, once with the full and once with the pruned prefill.

HFLM, the harness's transformers backend, takes a loaded model as it is and would then measure the full model, for it
asks for the logits of every token. Here a request's context goes through the prefill that is measured, as in serving:
its last token is the boundary token, and the answer is teacher-forced by decode. Requests with equal contexts (the
choices of one question) share one prefill. A context of one token, which `loglikelihood_rolling` uses, has nothing to
prune: those tasks give the full model's numbers for both.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from popcompile.arguments import SEED
from popcompile.errors import PopcompileError
from popcompile.loading import one_line, quiet
from popcompile.package.configs import load_tokenizer
from popcompile.quiet import errors_only
from popcompile.runtime.cache import KVCache
from popcompile.runtime.encoder import Encoder
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.session import Runtime, Stage
from popcompile.variants import with_full_model

PREFILLS: dict[str, Stage] = {"full": "decode", "pop": "prefill"}


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    provider: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Run tasks of the harness; returns {"package", "tasks": {prefill: {task: {metric: value}}}, "versions"}.

    limit: examples per task. include_path: a folder with task files of one's own. seed: of few-shot examples.
    Raises PopcompileError where the harness is not installed, or a task is unknown or cannot be run.
    """
    require_tasks(tasks, include_path)
    SEED.require("--seed", seed)
    _require_harness()
    from lm_eval import __version__ as harness_version

    tokenizer = load_tokenizer(Path(folder))
    results: dict[str, Any] = {}
    with with_full_model(Path(folder)) as complete, _silent():
        manager = _find_tasks(tasks, include_path)
        runtime = Runtime(complete, provider=provider)
        for prefill in PREFILLS:
            results[prefill] = _evaluate(PopForCausalLM(runtime, prefill), tokenizer, manager, tasks, limit, seed)
    return {
        "package": str(folder),
        "limit": limit,
        "seed": seed,
        "tasks": results,
        "versions": {"lm_eval": harness_version},
    }


def require_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """What can be said without the harness, which takes seconds to load. Raises PopcompileError."""
    if not tasks:
        raise PopcompileError("--tasks: names no task; give one, for example --tasks hellaswag")
    if include_path is not None and not include_path.is_dir():
        raise PopcompileError(f"--include-path {include_path}: no such folder; give the one with the task files")


def _require_harness() -> None:
    try:
        with quiet():
            importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        missing = f" ({one_line(error)})" if error.name != "lm_eval" else ""
        raise PopcompileError(
            f'--tasks: needs EleutherAI\'s harness{missing}; pip install lm-eval, or "popcompile[eval]"'
        ) from error


def _find_tasks(tasks: Sequence[str], include_path: Path | None) -> Any:
    """The harness's task manager that knows all `tasks`. Raises PopcompileError naming the first that none knows."""
    from lm_eval.tasks import TaskManager

    manager = None
    for defaults in (False, True) if include_path else (True,):  # the harness's own 14,000 take 10 s to list
        manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=defaults)
        if unknown := [task for task in tasks if task not in manager.task_index and not Path(task).is_file()]:
            continue
        return manager
    raise PopcompileError(
        f"--tasks {unknown[0]}: no such task; `lm-eval ls tasks` lists those of the harness, --include-path adds yours"
    )


def _evaluate(
    model: PopForCausalLM, tokenizer: Any, manager: Any, tasks: Sequence[str], limit: int | None, seed: int
) -> dict[str, Any]:
    """The harness's results: {task: {"metric,filter": value}}."""
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            model=_harness_model(model, tokenizer),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except PopcompileError:
        raise
    except Exception as error:  # tasks are programs of others: a data set is fetched, a metric imported, code is run
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise PopcompileError(f"--tasks {','.join(tasks)}: the harness cannot run it: {reason}") from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }


def _harness_model(model: PopForCausalLM, tokenizer: Any) -> Any:
    """`model` as the harness's HFLM. The class is made here, for its base is an optional package's."""
    from lm_eval.models.huggingface import HFLM

    encoder = Encoder(model.runtime, PREFILLS[model.prefill])

    class PopLM(HFLM):
        """Scores and generates with the prefill that the model was loaded with."""

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """Log-likelihood of each request's continuation, and whether it is the greedy one.

            requests: ((context, continuation) or None, context tokens, continuation tokens) each.
            """
            pairs = [_fit(context, answer, self.max_length) for _, context, answer in requests]
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            prefilled, encoded = None, None
            order = sorted(range(len(pairs)), key=lambda i: pairs[i])
            for i in tqdm(order, desc=f"{model.prefill} prefill", disable=not sys.stderr.isatty(), leave=False):
                context, answer = pairs[i]
                if encoded is None or prefilled != context:
                    prefilled, encoded = context, encoder.encode(torch.tensor(context))
                answers[i] = _score(encoder, *encoded, torch.tensor(answer))
                if (request := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answers[i])
            return answers

        def get_model_info(self) -> dict[str, Any]:
            """HFLM's own looks the model up on the hub."""
            return {"pruned": model.manifest.pruned, "prefill": model.prefill}

    return PopLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=model.manifest.context_length)


def _fit(context: list[int], answer: list[int], limit: int) -> tuple[list[int], list[int]]:
    """A request within the model's context of `limit` tokens: as HFLM does, the context loses its first tokens.

    The last token of the answer is predicted and not fed.
    """
    if len(answer) > limit:
        raise PopcompileError(f"--tasks: an answer has {len(answer)} tokens and the model's context is {limit}")
    return context[-(limit + 1 - len(answer)) :], answer


def _score(encoder: Encoder, first: Tensor, cache: KVCache, answer: Tensor) -> tuple[float, bool]:
    """Log-likelihood of `answer` [tokens] in nats, and whether each token is the most likely one. Keeps `cache`."""
    logits = encoder.predict(first, copy.deepcopy(cache) if len(answer) > 1 else cache, answer)
    likelihood = torch.log_softmax(logits.float(), -1).gather(1, answer[:, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == answer).all())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's log and what it prints to stdout, where a command's result goes."""
    with (
        quiet(),
        errors_only("lm_eval", "datasets"),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield
