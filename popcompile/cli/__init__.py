"""The command line: `popcompile COMMAND`.

Exit status 0 on success, 2 for what the user got wrong (one line on stderr, cause and fix), 1 for a failure of ours,
130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. Results go to stdout, progress to stderr and only on a terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popcompile.arguments import COUNT, NATS, POSITIVE, RATIO, SEED, TEMPERATURE, Parser, command, name, new_file, path
from popcompile.cli.bench import add_bench
from popcompile.cli.evaluate import add_evaluate
from popcompile.cli.failures import output_failed, what_to_fix
from popcompile.cli.signals import terminated
from popcompile.errors import PopcompileError
from popcompile.loading import one_line
from popcompile.terminal import flush, open_streams, say, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    open_streams()
    _quiet_libraries()
    status = _run_command(arguments)
    failure = flush(sys.stdout)
    if failure and not isinstance(failure, BrokenPipeError) and status == 0:
        status = 2
        say(f"popcompile: error: {output_failed(failure)}")
    flush(sys.stderr)
    return status


def _run_command(arguments: Sequence[str] | None) -> int:
    options = argparse.Namespace()
    try:
        with terminated():
            options = _parser().parse_args(arguments)
            _require_current_folder()
            return options.command(options) or 0
    except SystemExit as end:  # argparse's, or a signal's
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # the reader has left
    except Exception as error:
        if os.environ.get("POPCOMPILE_DEBUG") and not isinstance(error, PopcompileError):
            raise
        given = [str(value) for value in vars(options).values() if isinstance(value, str | Path)]
        if (message := what_to_fix(error, given)) is not None:
            say(f"popcompile: error: {message}")
            return 2
        reason = f"{type(error).__name__}: {one_line(error, 400)}"
        say(f"popcompile: internal error: {reason}; a bug of popcompile, POPCOMPILE_DEBUG=1 shows where")
        return 1


def _require_current_folder() -> None:
    """Libraries crash without one."""
    try:
        os.getcwd()
    except OSError as error:
        raise PopcompileError(
            f"the current folder cannot be found ({error.strerror}); it was removed, or this user may not enter it:"
            " change to another"
        ) from error


def _quiet_libraries() -> None:
    """Their warnings are not about what the user does. `python -W` and TRANSFORMERS_VERBOSITY bring them back.

    ONNX Runtime, from 1.29 on, would write an identifier into the home folder, report uses of it to its maker, and log
    where it cannot.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class _Version(argparse.Action):
    """Reads the version where it is asked for: that takes as long as all the rest of the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from popcompile import __version__

        show(f"popcompile {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="popcompile",
        description="Compile a Hugging Face decoder into an ONNX Runtime package whose prefill skips the layers that"
        " prompts do not need.",
    )
    parser.add_argument("--version", action=_Version, help="print popcompile's version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_convert(commands)
    _add_analyze(commands)
    _add_run(commands)
    _add_inspect(commands)
    _add_verify(commands)
    add_evaluate(commands)
    add_bench(commands)
    _add_demo(commands)
    return parser


def _add_convert(commands: Any) -> None:
    parser = command(
        commands,
        "convert",
        _convert,
        "Convert a model into a package.",
        "popcompile convert HuggingFaceTB/SmolLM2-135M-Instruct out/ --prune 1/3",
    )
    parser.add_argument("model", metavar="MODEL", type=name, help="hub id, local folder, or .gguf file")
    parser.add_argument("out", metavar="OUT", type=path, help="folder that the package appears at")
    parser.add_argument("--force", action="store_true", help="replace the package at OUT")

    pruning = parser.add_argument_group("what prefill skips")
    pruning.add_argument("--prune", metavar="N", help="how many layers: auto (default), a count, a fraction")
    pruning.add_argument("--layers", metavar="LIST", help="which layers, for example 20-29,17")
    pruning.add_argument(
        "--max-kl",
        metavar="X",
        type=NATS,
        help="what --prune auto may cost: KL in nats of the first token, of those after it and of answers in the"
        " prompt, each (default 0.05)",
    )
    pruning.add_argument("--max-ppl-ratio", metavar="X", type=RATIO, help="the same: perplexity over the whole model's")
    pruning.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=POSITIVE,
        help="length of the prompts that --prune auto chooses layers and window for (default 1024)",
    )
    pruning.add_argument(
        "--window",
        metavar="N",
        type=POSITIVE,
        help="tokens at the end of a prompt that take the whole model (default 64; 1 is the paper's)",
    )

    calibration = parser.add_argument_group("what takes the place of skipped layers")
    calibration.add_argument(
        "--kv-projection", metavar="KIND", help="calibrated (default), or layer: the pruned layers' own weights"
    )
    calibration.add_argument(
        "--calibration",
        default="self",
        metavar="FILE",
        type=name,
        help="text to calibrate on: a .txt or .jsonl file, or self (default), sampled from the model",
    )
    calibration.add_argument(
        "--calibration-texts", metavar="N", type=POSITIVE, default=104, help="pieces of that text (default 104)"
    )
    calibration.add_argument(
        "--refinement-steps",
        metavar="N",
        type=COUNT,
        default=64,
        help="steps of gradient descent after the fit in closed form (default 64; 0 for none)",
    )
    calibration.add_argument("--seed", metavar="N", type=SEED, default=0, help="of what is sampled (default 0)")

    package = parser.add_argument_group("the package")
    package.add_argument(
        "--layout",
        default="split",
        metavar="KIND",
        help="split (default): prefill.onnx and decode.onnx; unified: model.onnx, for runtimes that load one graph",
    )
    package.add_argument(
        "--dtype",
        metavar="TYPE",
        help="fp32, fp16, bf16, int8, int4 or w8a8 (default: fp32 on cpu, fp16 on cuda); int8 and int4 round weights,"
        " w8a8 multiplies in int8, for prompts on the CPU",
    )
    package.add_argument(
        "--block-size",
        metavar="N",
        type=POSITIVE,
        default=32,
        help="of int8, int4 and w8a8: inputs that share a scale (default 32)",
    )
    package.add_argument(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="to lower the graphs for: cpu (default) or cuda; genai_config.json names it",
    )

    source = parser.add_argument_group("the model")
    source.add_argument(
        "--adapter", metavar="DIR", type=name, help="a PEFT adapter (LoRA) to merge into the weights, or a hub id"
    )
    source.add_argument(
        "--gguf-file", metavar="NAME", type=name, help="the GGUF file to take from the folder or hub id MODEL"
    )
    source.add_argument("--random-weights", action="store_true", help="take only the config, for measurements")
    source.add_argument("--trust-remote-code", action="store_true", help="run model code that the checkpoint brings")


def _convert(options: argparse.Namespace) -> None:
    from popcompile.conversion import convert
    from popcompile.package.manifest import REPORT
    from popcompile.package.measurements import read_measurements
    from popcompile.package.report import format_layers
    from popcompile.progress import CONVERT_STEPS, progress_bar
    from popcompile.report.words import not_measured, quality_words, text_words, unmeasured

    with progress_bar(CONVERT_STEPS) as progress:
        manifest = convert(
            options.model,
            options.out,
            prune=options.prune,
            layers=options.layers,
            window=options.window,
            prompt_tokens=options.prompt_tokens,
            kv_projection=options.kv_projection,
            calibration=options.calibration,
            calibration_texts=options.calibration_texts,
            refinement_steps=options.refinement_steps,
            max_kl=options.max_kl,
            max_ppl_ratio=options.max_ppl_ratio,
            seed=options.seed,
            layout=options.layout,
            dtype=options.dtype,
            block_size=options.block_size,
            provider=options.provider,
            adapter=options.adapter,
            gguf_file=options.gguf_file,
            random_weights=options.random_weights,
            trust_remote_code=options.trust_remote_code,
            force=options.force,
            progress=progress,
        )
    report = json.loads((options.out / REPORT).read_bytes())
    shown = shlex.quote(str(options.out))
    if not report.get("choice", {}).get("met", True):
        allowed = {"--max-kl": options.max_kl, "--max-ppl-ratio": options.max_ppl_ratio}
        budget = ", ".join(f"{name} {value:g}" for name, value in allowed.items() if value is not None)
        say(
            f"popcompile: no pruning meets the budget ({budget or 'the default'}); prefill skips the last layer only,"
            " which costs nothing"
        )
    found = read_measurements(report, manifest)
    if found.quality is None:
        quality = not_measured(unmeasured(options.out, manifest, found)["quality"])
    else:
        quality = f"{quality_words(found.quality)}; {text_words(found.quality)}"
    size = sum(file["size"] for file in manifest.files.values()) / 1e6
    window = f"; the last {manifest.window} tokens of a prompt take every layer" if manifest.window > 1 else ""
    lines = [
        f"{options.out}: {manifest.num_layers} layers, prefill skips {len(manifest.pruned)}"
        f" ({format_layers(manifest.pruned)}){window}",
        f"made in {report['seconds']:.0f} s, {size:.0f} MB",
        f"quality: {quality}",
        f"next: popcompile run {shown} --prompt TEXT, popcompile bench {shown}, popcompile inspect {shown}",
    ]
    show("\n".join(lines))


def _add_analyze(commands: Any) -> None:
    parser = command(
        commands,
        "analyze",
        _analyze,
        "Measure how much prefill and decode need every layer of a model.",
        "popcompile analyze HuggingFaceTB/SmolLM2-135M-Instruct --plot importance.svg",
    )
    parser.add_argument("model", metavar="MODEL", type=name, help="hub id, local folder, or .gguf file")
    parser.add_argument("--per", default="layer", metavar="PART", help="layer (default), or block: attention and MLP")
    parser.add_argument("--texts", metavar="N", type=POSITIVE, default=24, help="texts to measure on (default 24)")
    parser.add_argument("--tokens", metavar="N", type=POSITIVE, default=192, help="tokens of a text (default 192)")
    parser.add_argument("--text", metavar="FILE", type=path, help="take texts from a file, not from the model itself")
    parser.add_argument("--seed", metavar="N", type=SEED, default=0, help="of texts and labels (default 0)")
    parser.add_argument(
        "--adapter", metavar="DIR", type=name, help="a PEFT adapter (LoRA) to merge into the weights, or a hub id"
    )
    parser.add_argument(
        "--gguf-file", metavar="NAME", type=name, help="the GGUF file to take from the folder or hub id MODEL"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that the checkpoint brings")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--plot", metavar="FILE", type=new_file, help="draw both stages into a .svg or .png file")


def _analyze(options: argparse.Namespace) -> None:
    from popcompile.progress import ANALYZE_STEPS, progress_bar
    from popcompile.pruning.analyze import analyze
    from popcompile.report.plots import require_plot_path, write_importance_plot

    if options.plot:
        require_plot_path(options.plot)
    names = ("per", "texts", "tokens", "text", "seed", "adapter", "gguf_file", "trust_remote_code")
    with progress_bar(ANALYZE_STEPS) as progress:
        found = analyze(options.model, **{name: getattr(options, name) for name in names}, progress=progress)
    show(json.dumps(found.to_json(), indent=2) if options.json else found.table())
    if options.plot:
        write_importance_plot(options.plot, found.importance, f"Importance by stage, {Path(options.model).name}")


def _add_run(commands: Any) -> None:
    parser = command(
        commands,
        "run",
        _run,
        "Answer a prompt, streaming, and print time to first token and tokens/s.",
        'popcompile run out/ --prompt "What is a B-tree?"',
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the prompt; a chat template is applied where there is one")
    what.add_argument("--prompt-file", metavar="FILE", type=path, help="a UTF-8 file with the prompt")
    what.add_argument(
        "--chat",
        action="store_true",
        help="talk, a message a line, until end of input; a message that cannot be answered is refused in one line, and"
        " the chat goes on (exit status 2 at its end)",
    )
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    _add_session_options(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=POSITIVE, default=128, help="default 128")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    parser.add_argument("--temperature", metavar="T", type=TEMPERATURE, default=0.7, help="default 0.7")
    parser.add_argument("--seed", metavar="N", type=SEED, default=0, help="with --sample (default 0)")


def _add_session_options(parser: Any) -> None:
    parser.add_argument("--prefill", default="auto", metavar="HOW", help="auto (default), pop or full")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")


def _run(options: argparse.Namespace) -> int:
    from popcompile.runtime.chat import answer, chat

    if options.chat:
        return chat(options.package, options)
    answer(options.package, options)
    return 0


def _add_inspect(commands: Any) -> None:
    parser = command(
        commands,
        "inspect",
        _inspect,
        "Show what every pass did to a package, how its layers were chosen, and what that costs.",
        "popcompile inspect out/ --html report.html",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--html", metavar="FILE", type=new_file, help="write all of it into one page, with plots")
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="print the graph before and after a pass")


def _inspect(options: argparse.Namespace) -> None:
    from popcompile.report.inspection import inspect_json, inspect_pass, inspect_text

    shown = {"--json": options.json, "--html": options.html is not None, "--pass": options.pass_name is not None}
    given = [name for name, is_given in shown.items() if is_given]
    if len(given) > 1:
        raise PopcompileError(f"{' and '.join(given)}: each shows the package in another way; give one of them")
    if options.json:
        show(json.dumps(inspect_json(options.package), indent=2))
    elif options.html is not None:
        from popcompile.report.page import write_html

        write_html(options.package, options.html)
        show(str(options.html))
    elif options.pass_name is not None:
        show(inspect_pass(options.package, options.pass_name))
    else:
        show(inspect_text(options.package))


def _add_verify(commands: Any) -> None:
    parser = command(
        commands,
        "verify",
        _verify,
        "Check a package: hashes, graphs, and prefill against decode in numbers.",
        "popcompile verify out/",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _verify(options: argparse.Namespace) -> None:
    from popcompile.runtime.session import find_provider
    from popcompile.runtime.verify import verify

    find_provider(options.provider)  # options are checked before the package
    checks = verify(options.package, provider=options.provider)
    if options.json:
        show(json.dumps({"package": str(options.package), "checks": checks}, indent=2))
    else:
        show("\n".join(f"ok  {check['check']}: {check['detail']}" for check in checks))


def _add_demo(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        _demo,
        "Convert SmolLM2-135M-Instruct, inspect it, and answer a long prompt with full and pruned prefill.",
        "popcompile demo",
    )
    parser.add_argument("--out", metavar="OUT", type=path, default=Path("popcompile-demo"), help="package folder")


def _demo(options: argparse.Namespace) -> None:
    from popcompile.cli.demo import demo

    demo(options.out)
