"""Measure what pruning costs in prompts with pictures: a package's pruned prefill against its own full model.

Each prompt is a picture and a question about it, as the package's processor and chat template write them, and is
encoded in full and pruned. What follows is the question's answer, where it is given; else the full model's, sampled.
Both caches are continued with it (teacher forcing), as compare.py does with text. Where answers are given, what each
prefill makes the model write is compared with them, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popcompile.arguments import POSITIVE, SEED
from popcompile.errors import PopcompileError
from popcompile.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from popcompile.evaluation.encoders import Encoders, open_encoders, require_comparable, require_vocabulary
from popcompile.evaluation.picture_questions import PictureQuestion, picture_questions
from popcompile.evaluation.summaries import PromptScores, answer_summary, comparison
from popcompile.package.configs import read_config, read_generation_config
from popcompile.package.evaluation import Evaluation
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.progress import Progress
from popcompile.runtime import conversation
from popcompile.runtime.image_text import encode_prompt_images
from popcompile.runtime.pictures import read_picture
from popcompile.runtime.providers import find_provider

#: tokens that are written beyond those of an answer, in case that the model says the same in more
_SPARE = 8


@dataclass(frozen=True)
class PictureSettings:
    """As the arguments of `evaluate_pictures`, in the order of the report."""

    images: str
    questions: str | None
    prompts: int
    continuation_tokens: int
    seed: int
    provider: str

    def require(self) -> None:
        """Raises PopcompileError where a number is none of its kind."""
        POSITIVE.require("--prompts", self.prompts)
        POSITIVE.require("--continuation-tokens", self.continuation_tokens)
        SEED.require("--seed", self.seed)
        find_provider(self.provider)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"confidence": CONFIDENCE, "resamples": RESAMPLES}


def evaluate_pictures(
    folder: str | Path,
    images: str | Path,
    questions: str | Path | None = None,
    prompts: int = 32,
    continuation_tokens: int = 64,
    seed: int = 0,
    provider: str = "cpu",
    baselines: bool = False,
    progress: Progress | None = None,
    *,
    reference: str | Path | None = None,
) -> Evaluation:
    """Compare the package's pruned prefill with its full model on questions about pictures.

    images: a folder with pictures. questions: a .jsonl file, {"image": name of a file there, "question", "answer"} a
    line, of which the answer may be missing; default: a few that can be asked of any picture. prompts: how many
    questions are asked at most. continuation_tokens: of answers that are sampled, at most. baselines, reference: as
    `compare.evaluate` takes them.

    Returns what package/evaluation.py says; all prompts are one text that is called by the folder's name.
    Raises PopcompileError.
    """
    started, folder = time.perf_counter(), Path(folder)
    settings = PictureSettings(
        str(images), None if questions is None else str(questions), prompts, continuation_tokens, seed, provider
    )
    settings.require()
    asked = picture_questions(Path(images), None if questions is None else Path(questions), prompts, seed)
    manifest, other = read_manifest(folder), None if reference is None else Path(reference)
    require_comparable(folder, manifest, other, baselines)
    if other is not None and read_manifest(other).images is None:
        raise PopcompileError(f"--reference {other}: takes no images; give a package whose model does")
    report = progress or (lambda *_: None)

    prompts_of = _Prompts(folder, manifest, continuation_tokens)
    sizes = [prompts_of.sizes(question) for question in asked]
    longest = max(tokens for tokens, _ in sizes)
    if manifest.pruned and longest <= manifest.window:
        raise PopcompileError(
            f"--images {images}: the prompts have at most {longest} tokens, and the package encodes prompts of up to"
            f" {manifest.window} in full, which loses nothing; give larger pictures"
        )
    scores: dict[str, list[PromptScores]] = {}
    answered: list[dict[str, bool]] = []
    generator = torch.Generator().manual_seed(seed)
    with open_encoders(folder, manifest, provider, reference=other, baselines=baselines, progress=report) as encoders:
        for index, question in enumerate(asked):
            report("evaluate", index, len(asked))
            found, answers = prompts_of.measure(encoders, question, generator)
            for name, score in found.items():
                scores.setdefault(name, []).append(score)
            answered += [answers] if answers else []
        report("evaluate", len(asked), len(asked))

    by_text = {name: {str(images): found} for name, found in scores.items()}
    result = comparison(folder, manifest, reference, settings.to_json(), by_text, seed)
    result["pictures"] = len({question.picture for question in asked})
    result["tokens"], result["image_tokens"] = map(list, zip(*sizes, strict=True))
    if answered:
        result["answers"] = answer_summary(answered, seed)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


class _Prompts:
    """Writes questions as a package's prompts, and measures what follows them."""

    def __init__(self, folder: Path, manifest: Manifest, sampled: int) -> None:
        """sampled: tokens of an answer that is not given, at most. Raises PopcompileError where it takes no images."""
        self._folder, self._manifest, self._sampled = folder, manifest, sampled
        self._encoder = conversation.Encoder(folder, manifest, raw=False)
        self._encoder.require_images()
        ends = read_generation_config(folder, manifest, read_config(folder, manifest)).eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    def sizes(self, question: PictureQuestion) -> tuple[int, int]:
        """Tokens of the prompt, and of its picture among them. Raises PopcompileError where there is no room for it."""
        ids, answer, images = self._encode(question)["input_ids"][0], self._answer(question), self._manifest.images
        assert images is not None
        seen = torch.isin(ids, torch.tensor(list(images.tokens.values())))
        require_vocabulary(self._folder, self._manifest, [torch.cat((ids[~seen], answer))])
        if question.answer and not len(answer):
            raise PopcompileError(f"{question.picture}: its answer has no tokens; give another, or leave it out")
        after, limit = len(answer) + _SPARE if len(answer) else self._sampled, self._manifest.context_length
        if len(ids) + after > limit:
            raise PopcompileError(
                f"{question.picture}: the prompt has {len(ids)} tokens, and with {after} after them more than the"
                f" model's context of {limit}; give a smaller picture, or a shorter question"
            )
        return len(ids), int(seen.sum())

    def _encode(self, question: PictureQuestion) -> dict[str, Tensor]:
        picture = read_picture(str(question.picture))
        try:
            return self._encoder.encode([conversation.user_message(question.question, [picture])])
        except PopcompileError as error:
            raise PopcompileError(f"{question.picture}: {error}") from error

    def _answer(self, question: PictureQuestion) -> Tensor:
        """Token ids [A]; none where it is not given."""
        text = question.answer or ""
        return torch.tensor(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def measure(
        self, encoders: Encoders, question: PictureQuestion, generator: torch.Generator
    ) -> tuple[dict[str, PromptScores], dict[str, bool]]:
        """Scores by encoder and, where its answer is given, which of them, the reference too, make the model write it.

        generator: of the answer that is sampled where there is none.
        """
        inputs, answer = self._encode(question), self._answer(question)
        ids = inputs.pop("input_ids")[0]
        full, own = encoders.full, encoders.compared["pop"].runtime
        images = {runtime: encode_prompt_images(runtime, ids, inputs) for runtime in {own, full.runtime}}
        found: dict[str, PromptScores] = {}
        written: dict[str, list[int]] = {}
        expected = torch.empty(0)
        for name, encoder in encoders.by_name.items():  # of which the reference is the first
            first, cache = encoder.encode(ids, images[full.runtime if encoder is full else own])
            if question.answer:
                count = len(answer) + (_SPARE if self._ends else 0)
                written[name] = encoder.write(first, copy.deepcopy(cache), count, self._ends, _likeliest)
            elif encoder is full:
                sampled = encoder.write(first, copy.deepcopy(cache), self._sampled, self._ends, _sampling(generator))
                answer = torch.tensor(sampled)
            predicted = encoder.predict(first, cache, answer)
            if encoder is full:
                expected = predicted
            else:
                found[name] = PromptScores.of(expected, predicted, answer)
        return found, {name: self._says(tokens, question.answer) for name, tokens in written.items()}

    def _says(self, tokens: list[int], answer: str | None) -> bool:
        """Whether what was written is the answer and nothing else."""
        text = str(self._encoder.tokenizer.decode([t for t in tokens if t not in self._ends]))
        return text.strip() == (answer or "").strip()


def _likeliest(logits: Tensor) -> int:
    return int(logits.argmax())


def _sampling(generator: torch.Generator) -> Callable[[Tensor], int]:
    """Draws a token from logits [vocabulary]."""
    return lambda logits: int(torch.multinomial(logits.float().softmax(-1), 1, generator=generator))
