"""What `popcompile demo` does: a real model converted, inspected, and answering with full and with pruned prefill."""

from __future__ import annotations

import io
import re
import tempfile
import time
from pathlib import Path

from popcompile.conversion import convert
from popcompile.frontend.samples import sample_model
from popcompile.package.configs import load_tokenizer
from popcompile.package.manifest import MANIFEST
from popcompile.progress import CONVERT_STEPS, progress_bar
from popcompile.report.inspection import inspect_text
from popcompile.runtime.chat import Timing, generate
from popcompile.runtime.conversation import encode
from popcompile.runtime.generation import load
from popcompile.terminal import show
from popcompile.text.documents import manual, paragraphs

#: what is asked, about how many characters of which topic of Python's manual
_QUESTION = "\n\nSummarize the text above in one sentence."
_TOPIC, _CHARACTERS = "objects", 4800
#: what `popcompile convert` chooses for this model; and few texts to calibrate on, to be done soon
_LAYERS, _TEXTS = "15,20-21,23-29", 16
#: tokens of a prompt that opens a session's files and threads before a longer one is timed, more than the window's
_WARM_UP, _ANSWER = 128, 48


def demo(out: Path) -> None:
    """Convert SmolLM2-135M-Instruct to `out` unless it is there, inspect it, and compare both prefills.

    Raises PopcompileError.
    """
    if not (out / MANIFEST).is_file():
        _convert(out)
    show(f"popcompile inspect {out}\n\n{inspect_text(out)}")
    timings = {how: _answer(out, how) for how in ("full", "pop")}
    full, pop = (timings[how].first_token for how in ("full", "pop"))
    show(
        f"time to first token: full prefill {full * 1e3:.0f} ms, pruned prefill {pop * 1e3:.0f} ms"
        f" ({full / pop:.2f}x sooner)"
    )


def _convert(out: Path) -> None:
    """With the layers given, and calibrated on a little text that is there: to choose and to sample take minutes."""
    started, prose = time.perf_counter(), _calibration_text()
    show("fetching SmolLM2-135M-Instruct (98 MB, kept in the cache folder) ...")
    model = sample_model("smollm2")
    with tempfile.TemporaryDirectory(prefix="popcompile-demo-") as folder:
        text = Path(folder) / "python-manual.txt"
        text.write_text(prose, encoding="utf-8")
        show(
            f"popcompile convert {model} {out} --layers {_LAYERS} --calibration {text.name}"
            f" --calibration-texts {_TEXTS} --refinement-steps 0"
        )
        with progress_bar(CONVERT_STEPS) as progress:
            convert(
                model,
                out,
                layers=_LAYERS,
                calibration=str(text),
                calibration_texts=_TEXTS,
                refinement_steps=0,
                progress=progress,
            )
    show(
        f"done in {time.perf_counter() - started:.0f} s, calibrated on {_TEXTS} pieces of Python's manual without what"
        " is asked about below; with no option convert chooses the layers, on more text of the model's own, and refines"
        " what takes their place, in some minutes\n"
    )


def _answer(out: Path, how: str) -> Timing:
    """Answer once to warm up, unheard, then once to be timed."""
    model, tokenizer = load(out, prefill=how), load_tokenizer(out)
    input_ids = encode(tokenizer, [{"role": "user", "content": _document() + _QUESTION}], raw=False)
    unheard = io.StringIO()
    generate(model, tokenizer, input_ids[:, :_WARM_UP], prefill=how, out=unheard, max_new_tokens=2, do_sample=False)
    show(f"--- {how} prefill")
    _, timing, _ = generate(model, tokenizer, input_ids, prefill=how, max_new_tokens=_ANSWER, do_sample=False)
    show(f"{timing}\n")
    model.close()
    return timing


def _document() -> str:
    """About a thousand tokens of English prose that Python itself ships: its reference on objects, without markup."""
    return re.sub(r'[*`="]+', "", " ".join(manual()[_TOPIC].split()))[:_CHARACTERS]


def _calibration_text() -> str:
    """The other topics' prose, each paragraph once: some stand under several topics."""
    prose = "\n\n".join(paragraphs(text) for topic, text in manual().items() if topic != _TOPIC)
    return "\n\n".join(dict.fromkeys(filter(None, prose.split("\n\n"))))
