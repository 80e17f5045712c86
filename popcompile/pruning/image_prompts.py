"""Prompts with images: pictures and text through the checkpoint's own processor, chat template and vision tower."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from popcompile.errors import PopcompileError
from popcompile.frontend.source import Source
from popcompile.loading import one_line, quiet, reading
from popcompile.package.configs import processor_in
from popcompile.package.image_inputs import GRIDS, PIXELS, ImageInputs
from popcompile.passes import Program
from popcompile.passes.graph import inputs_of
from popcompile.pruning.execution import Reader, call_reference, device_of, materialise
from popcompile.pruning.rows import ImageTokens, Rows
from popcompile.runtime.batch import Place
from popcompile.runtime.embeddings import positions_of
from popcompile.runtime.images import Array, encode_grids, encode_images
from popcompile.vision.inputs import image_inputs, token_side

#: pixels of the smallest picture, along a side
_SMALLEST = 2
#: how often a longer text is tried, where it has fewer tokens when it is encoded again
_TRIES = 4


@dataclass(frozen=True)
class ImageSource:
    """What a checkpoint's prompts with images are made by.

    side: pixels along each side of a token. pictures: a folder with the user's, None for self-made ones.
    """

    processor: ProcessorMixin
    inputs: ImageInputs
    side: int
    pictures: Path | None = None


def asking_processor(source: Source, pictures: Path | None = None) -> ProcessorMixin | None:
    """The processor that writes questions about pictures. None of a model of text alone, and of one without a tokenizer
    and a chat template to ask by.

    Raises PopcompileError where it cannot be loaded, and where there are the user's `pictures` and no way to ask.
    """
    processor = _processor(source)
    if processor is None and pictures is not None:
        raise PopcompileError(
            f"--calibration-images {pictures}: {source.name} has no processor with a chat template, which says where an"
            " image is in a prompt; add the files, or leave the option out"
        )
    return processor


def image_source(
    processor: ProcessorMixin | None, source: Source, program: Program, pictures: Path | None = None
) -> ImageSource | None:
    """None without a processor. program: with a graph "vision"."""
    if processor is None:
        return None
    return ImageSource(processor, image_inputs(source.config, program), token_side(source.config), pictures)


def _processor(source: Source) -> ProcessorMixin | None:
    files = source.processor_files()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not files or not source.save_tokenizer(folder):
            return None
        source.config.save_pretrained(folder)
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        with quiet(), reading(source.name, "its processor cannot be loaded"):
            processor = processor_in(name, source.config.model_type)
    return processor if processor.tokenizer.chat_template else None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt of one row. ids: [S]. features: of its image tokens [n, W]. places: where its images are."""

    ids: Tensor
    features: Tensor
    places: list[Place]


class ImagePrompts:
    """Writes prompts with images for one model."""

    def __init__(self, processor: ProcessorMixin, inputs: ImageInputs, program: Program, read: Reader) -> None:
        """program: with a graph "vision". Raises PopcompileError as `read` does."""
        self._processor, self._inputs = processor, inputs
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer  # type: ignore[attr-defined]
        self._vision = _Vision(program, read)

    def shortest(self) -> int:
        """Tokens of a prompt with the smallest picture alone. Raises PopcompileError where the processor refuses it."""
        return len(self._encode([Image.new("RGB", (_SMALLEST, _SMALLEST), "white")])["input_ids"][0])

    def write(
        self, parts: Sequence[str | Image.Image], tokens: int, text: Sequence[int], at: int
    ) -> ImagePrompt | None:
        """A user's turn of these texts and pictures, and the end of `text` before part `at`, as much of it as the
        prompt needs to have so many tokens. text: ids, which are taken several times if there are too few. None where
        the parts alone have more, or the text makes no tokens.
        """
        encoded = self._encode(parts)
        bare = encoded["input_ids"][0]
        if len(bare) == tokens:
            return self._prompt(encoded, 0, 0)
        ids = [i for i in text if i not in self.tokenizer.added_tokens_decoder]
        if len(bare) > tokens or not ids:
            return None
        wanted = tokens - len(bare)
        for _ in range(_TRIES):
            wanted = 2 * wanted + 8  # a text may have fewer tokens when it is encoded again
            words = str(self.tokenizer.decode((ids * -(-wanted // len(ids)))[-wanted:])).strip()
            encoded = self._encode([*parts[:at], f"{words}\n", *parts[at:]])
            longer = encoded["input_ids"][0]
            if len(longer) >= tokens:
                begin = int((longer[: len(bare)] == bare).int().cumprod(0).sum())
                return self._prompt(encoded, begin, len(longer) - tokens)
        return None

    def _encode(self, parts: Sequence[str | Image.Image]) -> Any:
        """What the processor makes of a user's turn, up to where the model answers."""
        content: Any = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]
        try:
            with quiet():
                return self._processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                    return_tensors="pt",
                )  # fmt: skip
        except Exception as error:  # a template is a program of the model's author, and processors raise anything
            raise PopcompileError(
                f"the model's processor refuses a prompt with a picture ({one_line(error)}); fix it, or give"
                " --kv-projection layer with --prune 1/3 or --layers, which ask nothing"
            ) from error

    def _prompt(self, encoded: Any, begin: int, left_out: int) -> ImagePrompt:
        """Without so many tokens from `begin` on."""
        ids = encoded["input_ids"][0]
        ids = torch.cat((ids[:begin], ids[begin + left_out :]))
        pixels = encoded[PIXELS["image"]].numpy()
        merge, fixed = self._inputs.merge, self._inputs.tokens_per_image
        if merge:
            grids = encoded[GRIDS["image"]].numpy()
            sizes = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in grids]
            features = encode_grids(self._vision, pixels, grids, merge)
        else:
            sizes = [(1, fixed)] * len(pixels)
            features = encode_images(self._vision, pixels)
        slots = (ids == self._inputs.tokens["image"]).nonzero()[:, 0].tolist()
        counts = [rows * columns for rows, columns in sizes]
        begins = [slots[sum(counts[:i])] for i in range(len(counts))]
        return ImagePrompt(ids, torch.from_numpy(features), [Place(b, *s) for b, s in zip(begins, sizes, strict=True)])

    def rows(self, prompts: Sequence[ImagePrompt], length: int) -> Rows:
        """Rows of so many tokens that begin with these prompts; the tokens behind them are zeros, and text."""
        ids = torch.zeros(len(prompts), length, dtype=torch.int64)
        index = torch.full_like(ids, -1)
        position_ids = torch.empty(self._inputs.axes, *ids.shape, dtype=torch.int64)
        first = 0
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt.ids)] = prompt.ids
            for place in prompt.places:
                count = place.rows * place.columns
                index[i, place.begin : place.begin + count] = torch.arange(first, first + count)
                first += count
            if self._inputs.axes:
                position_ids[:, i] = positions_of(length, 0, prompt.places, self._inputs.axes)[0].T
        features = torch.cat([prompt.features for prompt in prompts])
        return Rows(ids, ImageTokens(features, index, position_ids))


class _Vision:
    """The vision graph in PyTorch, in the place of ONNX Runtime's session."""

    def __init__(self, program: Program, read: Reader) -> None:
        graph = materialise(program.graphs["vision"], program, read)
        self._names, self._run, self._device = list(inputs_of(graph)), call_reference(graph), device_of(graph)

    @torch.no_grad()
    def run(self, _: None, inputs: dict[str, Array], /) -> list[Array]:
        given = (torch.from_numpy(inputs[name]).to(self._device) for name in self._names)
        return [out.cpu().numpy() for out in self._run(*given)]
