"""`popcompile analyze`: importance of every layer of a model, for prefill and for decode."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from tabulate import tabulate
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from popcompile.arguments import SEED
from popcompile.errors import PopcompileError
from popcompile.frontend.adapter import Adapter
from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.positions import context_length
from popcompile.frontend.source import Source, open_source
from popcompile.frontend.tensor_names import settle_ties
from popcompile.frontend.tracing import trace
from popcompile.loading import quiet, reading
from popcompile.package.report import Importance
from popcompile.passes import ContractError, PassManager, Program, canonicalization
from popcompile.passes.graph import outputs_of, shape_of
from popcompile.passes.insert_virtual_gates import Per
from popcompile.pruning.device import find_device, memory_explained
from popcompile.pruning.execution import HeldParameters, Reader, checked, fast_products
from popcompile.pruning.importance import importance, random_stream
from popcompile.pruning.rows import Rows
from popcompile.pruning.sampling import begun, random_starts, sample_behind
from popcompile.text.documents import read_texts, windows
from popcompile.vision.tracing import build_model, trace_images

#: texts and tokens of each by default: a few minutes on two cores for a model of 135 M parameters
TEXTS, TOKENS = 24, 192


@dataclass(frozen=True)
class Analysis:
    """What `popcompile analyze` shows. `texts` of `tokens` tokens each were used; `seconds` is the whole command's."""

    model: str
    texts: int
    tokens: int
    seed: int
    per: Per
    seconds: float
    importance: Importance

    def to_json(self) -> dict[str, Any]:
        """One document; entries of `layers` have a "block" where gates are per block. An unknown error is null."""
        fields = {name: getattr(self, name) for name in ("model", "texts", "tokens", "seed", "per", "seconds")}
        return fields | {"layers": importance_rows(self.importance)}

    def table(self) -> str:
        """The table for a terminal, ending in what it was measured on."""
        rows = []
        for row in importance_rows(self.importance):
            prefill, decode = row["prefill"], row["decode"]
            blocks = [row["block"]] if "block" in row else []
            cells = [_with_error(row[stage], row[f"{stage}_error"]) for stage in ("prefill", "decode")]
            rows.append([row["layer"], *blocks, *cells, f"{prefill / decode:.3g}" if decode else "-"])
        headers = ["layer", *(["block"] if self.importance.blocks else []), "prefill", "decode", "prefill/decode"]
        align = ["right", *(["left"] if self.importance.blocks else []), "right", "right", "right"]
        table = tabulate(rows, headers, disable_numparse=True, colalign=align)
        measured = f"{self.texts} texts of {self.tokens} tokens, seed {self.seed}, {self.seconds} s"
        return f"{table}\n\n{self.model}: {measured}; ± is the standard error over texts"


def importance_rows(found: Importance) -> list[dict[str, Any]]:
    """[{"layer", ("block",) "prefill", "decode", "prefill_error", "decode_error"}]; an unknown error is None."""
    blocks = len(found.blocks) or 1
    rows = []
    for i, (prefill, decode) in enumerate(zip(found.prefill, found.decode, strict=True)):
        row: dict[str, Any] = {"layer": i // blocks}
        if found.blocks:
            row["block"] = found.blocks[i % blocks]
        row |= {"prefill": prefill, "decode": decode}
        for stage, error in (("prefill", found.prefill_error[i]), ("decode", found.decode_error[i])):
            row[f"{stage}_error"] = None if math.isnan(error) else error
        rows.append(row)
    return rows


def analyze(
    model: str | Path,
    *,
    per: str = "layer",
    texts: int = TEXTS,
    tokens: int = TOKENS,
    text: Path | None = None,
    seed: int = 0,
    text_only: bool = False,
    gguf_file: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    progress: Callable[[str, int, int], Any] | None = None,
) -> Analysis:
    """Importance of every layer of `model` (hub id, folder or GGUF file), or of its blocks (per="block").

    texts, tokens: how many texts, and tokens of each, the last of which is the boundary token. They are sampled from
    the model itself, or taken from the file `text`. text_only: take a multimodal model's text decoder. adapter: a PEFT
    adapter to merge into the weights first. device: what PyTorch runs the model on, "cpu", "cuda" or "cuda:N".
    progress(step, done, total). Raises PopcompileError.
    """
    started = time.perf_counter()
    report = progress or (lambda *_: None)
    part: Per | None = next((known for known in get_args(Per) if known == per), None)
    if part is None:
        raise PopcompileError(f"--per {per}: unknown; choose one of {', '.join(get_args(Per))}")
    if texts < 1:
        raise PopcompileError(f"--texts {texts}: give at least 1")
    if tokens < 2:
        raise PopcompileError(f"--tokens {tokens}: give at least 2, a context token and the boundary token")
    SEED.require("--seed", seed)
    place = find_device(device)
    documents = read_texts(text) if text is not None else None
    source = open_source(str(model), text_only=text_only, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    merged = Adapter(str(adapter)) if adapter is not None else None
    if tokens > (positions := context_length(source.decoder_config)):
        raise PopcompileError(f"--tokens {tokens}: {source.name} has {positions} positions; give fewer")
    tokenizer = source_tokenizer(source, trust_remote_code)
    chosen = None
    if text is not None and documents is not None:
        chosen = _tokens_of(text, documents, tokenizer, texts, tokens, seed, source.name)
    report("trace", 0, 1)
    settle_ties(source)
    program = trace(source.config, torch.float32, trust_remote_code=trust_remote_code)
    if source.has_images:
        program.add(trace_images(build_model(source.config)))
    read = HeldParameters(checked(Checkpoint(source, program, torch.float32, merged).read, source.name), place)
    try:
        PassManager(canonicalization()).run(program)
        with memory_explained(place):
            if chosen is None:
                chosen = sample_texts(program, read, tokenizer, texts, tokens, seed, lambda *n: report("sample", *n))
            with fast_products():
                found = importance(program, read, chosen, per=part, seed=seed, progress=partial(report, "analyze"))
    except ContractError as error:
        raise PopcompileError(
            f"{source.name}: {source.config.model_type} has a structure that popcompile cannot analyze ({error})"
        ) from error
    seconds = round(time.perf_counter() - started, 1)
    return Analysis(str(model), len(chosen), chosen.length, seed, part, seconds, found)


def sample_texts(
    program: Program,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], Any] | None = None,
) -> Rows:
    """`count` texts of the model's own, each from a start of its own; `program` is canonical."""
    vocabulary = int(shape_of(outputs_of(program.graphs["model"])[0])[2])
    starts = random_starts(tokenizer, vocabulary, count, random_stream(seed, "starts"))
    rows, given = begun([start[:length] for start in starts], length)
    return sample_behind(program, read, rows, given, random_stream(seed, "texts"), progress)


def source_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a source, None where it has none. Raises PopcompileError where it cannot be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        if not source.save_tokenizer(Path(folder)):
            return None
        with quiet(), reading(source.name, "the tokenizer cannot be loaded"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _tokens_of(
    path: Path,
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    seed: int,
    model: str,
) -> Rows:
    if tokenizer is None:
        raise PopcompileError(f"{model}: has no tokenizer, which --text {path} needs; leave out --text")
    return Rows(torch.stack(windows(tokenizer, documents, count, length, seed, str(path))))


def _with_error(value: float, error: float | None) -> str:
    if value == 0:
        return "0"
    return f"{value:.3g}" + (f" ± {error:.1g}" if error is not None else "")
