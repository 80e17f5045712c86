"""`popcompile convert`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from popcompile.arguments import COUNT, DEVICE, NATS, POSITIVE, RATIO, SEED, TEXT_ONLY, command, name, path
from popcompile.terminal import say, show


def add_convert(commands: Any) -> None:
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what long steps make in OUT.steps until the package is there, and go on from what is kept",
    )

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
        "--calibration-images",
        metavar="DIR",
        type=name,
        help="pictures to calibrate a vision-language model on (default: self-made ones)",
    )
    calibration.add_argument(
        "--calibration-texts",
        metavar="N",
        type=POSITIVE,
        default=104,
        help="pieces of that text; half of them prompts with images, where the model takes these (default 104)",
    )
    calibration.add_argument(
        "--refinement-steps",
        metavar="N",
        type=COUNT,
        default=64,
        help="steps of gradient descent after the fit in closed form (default 64; 0 for none)",
    )
    calibration.add_argument("--device", metavar="NAME", default="cpu", help=DEVICE)
    calibration.add_argument("--seed", metavar="N", type=SEED, default=0, help="sampling seed (default 0)")

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
        help="int8, int4 and w8a8: input features that share a scale (default 32)",
    )
    package.add_argument(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="to lower the graphs for: cpu (default) or cuda; genai_config.json names it",
    )

    source = parser.add_argument_group("the model")
    source.add_argument("--text-only", action="store_true", help=TEXT_ONLY)
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
            calibration_images=options.calibration_images,
            calibration_texts=options.calibration_texts,
            refinement_steps=options.refinement_steps,
            device=options.device,
            max_kl=options.max_kl,
            max_ppl_ratio=options.max_ppl_ratio,
            seed=options.seed,
            layout=options.layout,
            dtype=options.dtype,
            block_size=options.block_size,
            provider=options.provider,
            text_only=options.text_only,
            adapter=options.adapter,
            gguf_file=options.gguf_file,
            random_weights=options.random_weights,
            trust_remote_code=options.trust_remote_code,
            force=options.force,
            resume=options.resume,
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
        f"next: popcompile run {shown} --prompt TEXT, popcompile bench {shown} --save, popcompile inspect {shown}",
    ]
    show("\n".join(lines))
