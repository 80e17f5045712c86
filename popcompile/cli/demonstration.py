"""What `popcompile demo` does: a real model converted, inspected, and answering with full and with pruned prefill."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.frontend.samples import sample_model
from popcompile.package.configs import load_tokenizer
from popcompile.package.manifest import MANIFEST
from popcompile.progress import CONVERT_STEPS, progress_bar
from popcompile.report.inspection import inspect_text
from popcompile.runtime.chat import Timing, generate
from popcompile.runtime.conversation import encode
from popcompile.runtime.generation import load
from popcompile.terminal import show

_QUESTION = "\n\nSummarize the text above in one sentence."
_CHARACTERS = 4800
#: what `popcompile convert` chooses for this model; and, to be done soon, few texts to calibrate on, and short prompts
#: to measure lost answers in
_LAYERS, _TEXTS, _TOKENS = "15,20-21,23-29", 24, 256


def demo(out: Path) -> None:
    """Convert SmolLM2-135M-Instruct to `out` unless it is there, inspect it, and compare both prefills.

    Raises PopcompileError.
    """
    if not (out / MANIFEST).is_file():
        started = time.perf_counter()
        show("fetching SmolLM2-135M-Instruct (98 MB, kept in the cache folder) ...")
        model = sample_model("smollm2")
        few = f"--calibration-texts {_TEXTS} --refinement-steps 0 --prompt-tokens {_TOKENS}"
        show(f"popcompile convert {model} {out} --layers {_LAYERS} {few}")
        with progress_bar(CONVERT_STEPS) as progress:
            convert(
                model,
                out,
                layers=_LAYERS,
                prompt_tokens=_TOKENS,
                calibration_texts=_TEXTS,
                refinement_steps=0,
                progress=progress,
            )
        show(f"done in {time.perf_counter() - started:.0f} s; without --layers it chooses them, in some minutes\n")
    show(f"popcompile inspect {out}\n\n{inspect_text(out)}")
    timings = {how: _answer(out, how) for how in ("full", "pop")}
    full, pop = (timings[how].first_token for how in ("full", "pop"))
    show(
        f"time to first token: full prefill {full * 1e3:.0f} ms, pruned prefill {pop * 1e3:.0f} ms"
        f" ({full / pop:.2f}x sooner)"
    )


def _answer(out: Path, how: str) -> Timing:
    """Answer once to warm up, unheard, then once to be timed."""
    model, tokenizer = load(out, prefill=how), load_tokenizer(out)
    input_ids = encode(tokenizer, [{"role": "user", "content": _document() + _QUESTION}], raw=False)
    generate(model, tokenizer, input_ids, prefill=how, out=io.StringIO(), max_new_tokens=1, do_sample=False)
    show(f"--- {how} prefill")
    _, timing, _ = generate(model, tokenizer, input_ids, prefill=how, max_new_tokens=48, do_sample=False)
    show(f"{timing}\n")
    return timing


def _document() -> str:
    """About a thousand tokens of English prose that Python itself ships: its reference on objects, without markup."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise PopcompileError("this Python has no pydoc_data; install its full standard library") from error
    return re.sub(r'[*`="]+', "", " ".join(topics["objects"].split()))[:_CHARACTERS]
