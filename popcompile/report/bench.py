"""A benchmark as tables on the terminal."""

from __future__ import annotations

from tabulate import tabulate

from popcompile.package.benchmark import Benchmark, Memory, PromptTimes, Timing
from popcompile.report.words import counted, share


def bench_text(result: Benchmark) -> str:
    """The result of `bench.bench` for a terminal."""
    head = (
        f"{result['package']}: {result['source']}, {result['dtype']}, prefill skips {len(result['pruned'])} of"
        f" {result['num_layers']} layers"
    )
    headers, rows = time_rows(result)
    align = ("right", "left", *["right"] * (len(headers) - 2))
    times = tabulate(rows, headers, disable_numparse=True, colalign=align)
    seen = [f"prompts: {images_words(result)} beside their tokens of text"] if _images(result) else []
    return "\n\n".join(["\n".join([head, *seen, *measured_on(result)]), times, _memory(result)])


def measured_on(result: Benchmark) -> tuple[str, str]:
    """The machine, and how times were taken."""
    settings, versions = result["settings"], result["versions"]
    kinds = {subject["kind"] for subject in result["subjects"]}
    genai = f", onnxruntime-genai {versions['onnxruntime_genai']}" if "genai" in kinds else ""
    transformers = (
        f", transformers {versions['transformers']}, torch {versions['torch']}" if "transformers" in kinds else ""
    )
    programs = dict.fromkeys(subject["runtime"] for subject in result["subjects"] if subject.get("runtime"))
    gpu = f"{result['gpu']}, " if result["gpu"] else ""
    rows = f", {settings['batch']} rows" if settings["batch"] > 1 else ""
    return (
        f"{settings['runtime']}, {settings['provider']}, {gpu}threads: {settings['threads']}, {result['cpu']};"
        f" onnxruntime {versions['onnxruntime']}{genai}{transformers}{''.join(f', {name}' for name in programs)}",
        f"median ± half the spread of {settings['repeats']} turns, subjects alternating{rows};"
        f" {settings['decode_tokens']} tokens decoded after each prompt",
    )


def images_words(result: Benchmark) -> str:
    """The images of a prompt: how many there are, and of how many tokens each is."""
    counts = [f"{rows * columns:,}" for rows, columns in _images(result)]
    return f"{counted(len(counts), 'image')} of {'+'.join(counts)} tokens"


def _images(result: Benchmark) -> list[list[int]]:
    """Rows and columns of each; reports of text alone may not say that there are none."""
    found: list[list[int]] = result["settings"].get("images", [])
    return found


def prompt_tokens(result: Benchmark, length: int) -> int:
    """Of a prompt with so many tokens of text."""
    return length + sum(rows * columns for rows, columns in _images(result))


def first_token_words(result: Benchmark) -> list[tuple[int, str]]:
    """For each length of prompt, in tokens of text, the time to the first token, of the package and its full model."""
    pop, full = result["subjects"][:2]
    images = f"{images_words(result)}: " if _images(result) else ""
    words = []
    for pruned, whole in zip(pop["lengths"], full["lengths"], strict=True):
        ours, theirs = pruned["time_to_first_token"], whole["time_to_first_token"]
        seen = f", {_vision_share(pruned)} of it vision" if images else ""
        times = f"{images}{_milliseconds(ours)} ms{seen}; full model {_milliseconds(theirs)} ms"
        words.append((pruned["tokens"], f"{times} ({theirs['median'] / ours['median']:.2f}x)"))
    return words


def _vision_share(row: PromptTimes) -> str:
    return share(row["vision"]["median"] / row["time_to_first_token"]["median"])


def time_rows(result: Benchmark) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row for each length and subject; ratios are how many times pop's median. With images, what vision
    takes of the time to the first token stands before the decoder's prefill.
    """
    ratios = {(ratio["over"], ratio["tokens"]): ratio for ratio in result["ratios"]}
    has_images = bool(_images(result))
    rows = []
    for index, length in enumerate(result["settings"]["lengths"]):
        for subject in result["subjects"]:
            measured = subject["lengths"][index]
            prefill, first, decode = measured["prefill"], measured["time_to_first_token"], measured["decode"]
            ratio = ratios.get((subject["name"], length))
            vision = [_milliseconds(measured["vision"]), _vision_share(measured)] if has_images else []
            rows.append(
                [
                    f"{length:,}",
                    subject["name"],
                    *vision,
                    _milliseconds(prefill),
                    _ratio(ratio and ratio["prefill"]),
                    f"{prefill['tokens_per_second']:,.0f}",
                    _milliseconds(first),
                    _ratio(ratio and ratio["time_to_first_token"]),
                    f"{decode['tokens_per_second']:.1f}",
                ]
            )
    vision = ["vision, ms", "of first token"] if has_images else []
    headers = ["tokens", "subject", *vision, "prefill, ms", "/ pop", "tokens/s", "first token, ms", "/ pop"]
    return [*headers, "decode, tokens/s"], rows


def _milliseconds(timing: Timing) -> str:
    median, spread = timing["median"] * 1e3, timing["half_spread"] * 1e3
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ± {spread:.{digits}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _memory(result: Benchmark) -> str:
    """A row for each subject, in MB (10^6 bytes)."""
    rows = [
        [subject["name"], *_held(subject["memory"]), f"{subject['load_seconds']:.1f}"] for subject in result["subjects"]
    ]
    kinds = ["anonymous memory, at most, MB", "resident, at most, MB", *(["on the GPU, MB"] if result["gpu"] else [])]
    headers = ["subject", *kinds, "loaded in, s"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(kinds) + 1)))


def _held(memory: Memory) -> list[str]:
    on_gpu = [memory["gpu"]] if "gpu" in memory else []
    return [_megabytes(size) for size in (memory["anonymous"], memory["peak"], *on_gpu)]


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.0f}"
