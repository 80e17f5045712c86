"""What pruning costs a tiny vision-language model that train_tiny_vlm.py made: one table.

    python examples/tiny_vlm_study.py OUT --layers 4-5 3-5 --windows 1 8

"pictures" are questions about one picture: KL in nats of the first token, and of those after it, and the share of them
that is answered exactly. "codes" are questions about one picture of several, which the prompt calls by names.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tabulate import tabulate
from tiny_vlm.conversations import Codes, Conversation
from tiny_vlm.families import FAMILIES, Family
from tiny_vlm.inputs import Inputs
from transformers import AutoConfig

import popcompile
from popcompile.evaluation.pictures import evaluate_pictures

#: pictures in a prompt of codes
_PICTURES = 3
#: tokens of an answer and its end, at most
_ANSWER = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("made", type=Path, help="what train_tiny_vlm.py wrote")
    parser.add_argument("--layers", nargs="+", default=["5", "4-5", "3-5", "2-5"])
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--questions", type=int, default=300, help="of each kind (default 300)")
    options = parser.parse_args()
    family = FAMILIES[AutoConfig.from_pretrained(options.made / "model").model_type]
    asked = codes(family, options.questions)
    table: list[list[str]] = []
    for layers in options.layers:
        for projection in ("layer", "calibrated"):
            for window in options.windows:
                with tempfile.TemporaryDirectory() as name:
                    package = compile_model(options.made, Path(name) / "package", layers, window, projection)
                    table += rows(options.made, package, asked, options.questions, [layers, projection, str(window)],
                                  with_full=not table)  # fmt: skip
                    print(*table[-1], sep=" | ", flush=True)
    headers = ["pruned of 6", "projections", "window", "first-token KL", "KL after it", "pictures", "codes"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


def compile_model(made: Path, package: Path, layers: str, window: int, projection: str) -> Path:
    """projection: of keys and values, "calibrated" on the pictures beside the model or "layer", the layers' own."""
    on_pictures = {"calibration_images": made / "pictures", "prompt_tokens": 256}
    options: Any = on_pictures if projection == "calibrated" else {}
    popcompile.convert(made / "model", package, layers=layers, window=window, kv_projection=projection, **options)
    return package


def rows(
    made: Path, package: Path, asked: Sequence[Conversation], questions: int, label: list[str], with_full: bool
) -> list[list[str]]:
    """The full model's row of the table, where it is wanted, and the package's."""
    found = evaluate_pictures(package, made / "questions", made / "questions" / "questions.jsonl", prompts=questions)
    (metrics,) = found["texts"].values()
    answered = found["answers"]["answered"]
    table = []
    if with_full:
        full = share_answered(made / "model", package, asked, "full")
        table.append(["none", "", "", "", "", f"{answered['reference']['value']:.3f}", f"{full:.3f}"])
    kl, after = (metrics[name]["value"] for name in ("first_token_kl_mean", "continuation_kl_mean"))
    pruned = share_answered(made / "model", package, asked, "pop")
    return [*table, [*label, f"{kl:.4f}", f"{after:.4f}", f"{answered['pop']['value']:.3f}", f"{pruned:.3f}"]]


def codes(family: Family, count: int) -> list[Conversation]:
    """Questions about one of several pictures, whose names the prompt says."""
    random = Random("codes to be asked")
    kinds = [Codes(digits, _PICTURES, pictured=_PICTURES, sizes=family.sizes) for digits in (1, 2)]
    return [random.choice(kinds).conversation(random, 1) for _ in range(count)]


@torch.no_grad()
def share_answered(model: Path, package: Path, asked: Sequence[Conversation], prefill: str) -> float:
    """Of the questions, those that the package answers exactly. model: has the tokenizer and the image processor."""
    family = FAMILIES[AutoConfig.from_pretrained(model).model_type]
    inputs, runtime, right = Inputs(family, model), popcompile.load(package, prefill=prefill), 0
    for conversation in asked:
        prompt = inputs.prompts([conversation])
        arguments: Any = prompt | {"max_new_tokens": _ANSWER, "do_sample": False}
        written = runtime.generate(**arguments)[0, prompt["input_ids"].shape[1] :]
        text = str(inputs.tokenizer.decode(written)).split(family.end)[0]
        right += text.strip() == conversation.turns[0][1]
    return right / len(asked)


if __name__ == "__main__":
    main()
