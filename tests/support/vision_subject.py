"""A tiny Qwen3-VL with all that calibration on images takes: canonical program, weights, processor and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vision_reference as reference
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from vision_checkpoint import PROCESSOR, save_vision_checkpoint

from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import Source, open_source
from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, canonicalization
from popcompile.pruning.execution import HeldParameters, Reader, materialise
from popcompile.pruning.image_prompts import ImagePrompt, ImagePrompts, ImageSource, asking_processor, image_source
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.rows import decoder_inputs
from popcompile.vision.tracing import build_model, trace_images


@dataclass
class VisionSubject:
    """model: transformers' module."""

    model: PreTrainedModel
    folder: Path

    @classmethod
    def saved(cls, folder: Path, most_pixels: int = 4096, **changes: Any) -> VisionSubject:
        """changes: of the text config. most_pixels: of a picture; 256 are a token, and the fewest."""
        model = reference.random_model(reference.qwen3_vl(**{"max_position_embeddings": 512} | changes))
        save_vision_checkpoint(model, folder)
        size = {"shortest_edge": 256, "longest_edge": most_pixels}
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"size": size}))
        return cls(model, folder)

    @cached_property
    def source(self) -> Source:
        return open_source(str(self.folder))

    @cached_property
    def _compiled(self) -> tuple[Program, Reader]:
        program = trace(self.source.config)
        program.add(trace_images(build_model(self.source.config)))
        read = HeldParameters(Checkpoint(self.source, program, torch.float32).read)
        PassManager(canonicalization()).run(program)
        return program, read

    @property
    def program(self) -> Program:
        return self._compiled[0]

    @property
    def read(self) -> Reader:
        return self._compiled[1]

    @cached_property
    def layers(self) -> LayerwiseModel:
        graph = materialise(self.program.graphs["model"], self.program, self.read)
        return LayerwiseModel(graph, decoder_inputs(self.program, self.read))

    @cached_property
    def images(self) -> ImageSource:
        found = image_source(asking_processor(self.source), self.source, self.program)
        assert found is not None
        return found

    @cached_property
    def prompts(self) -> ImagePrompts:
        return ImagePrompts(self.images.processor, self.images.inputs, self.program, self.read)

    def reference_prompt(self, ids: Tensor, pictures: list[Image.Image]) -> reference.Prompt:
        """What transformers is given of ids [S] with these pictures among them."""
        processor: Any = self.images.processor
        return reference.Prompt(ids[None], dict(processor.image_processor(images=pictures, return_tensors="pt")))

    def written(self, pictures: list[Image.Image], tokens: int, at: int = 0) -> ImagePrompt:
        """A prompt of so many tokens, with words of the tokenizer's before part `at`."""
        words = torch.randint(3, 80, (20,), generator=torch.Generator().manual_seed(len(pictures))).tolist()
        prompt = self.prompts.write([*pictures, "w8 w9"], tokens, words, at)
        assert prompt is not None
        return prompt
