"""A checkpoint through transformers itself: what a package was converted from, as its users run it today."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from popcompile.export.providers import PROVIDERS
from popcompile.loading import quiet, reading
from popcompile.package.image_inputs import GRIDS, PIXELS, ImageInputs
from popcompile.runtime.noise import Size, make_prompt, noise
from popcompile.upstream import CACHE


class TransformersRunner:
    """Prompts and images in every row as those of the package that it is compared with."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        provider: str,
        threads: int,
        sizes: Sequence[Size] = (),
        images: ImageInputs | None = None,
    ) -> None:
        """dtype: of all weights, a name of PyTorch's. images: what a vision-language model takes, of which `sizes` are.

        Raises PopcompileError where transformers does not load it.
        """
        torch.set_num_threads(threads)
        kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
        with quiet(), reading(str(folder), "transformers does not load it; leave it out of --against"):
            model: PreTrainedModel = kind.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = model.eval().to(PROVIDERS[provider].device)
        self._sizes, self._images = list(sizes), images

    def encode(self, ids: list[list[int]]) -> dict[str, Tensor]:
        rows = [torch.tensor(row) for row in ids]
        if not self._images or not self._sizes:
            return self._on_device({"input_ids": torch.stack(rows)})
        rows = [make_prompt(self._images, row, self._sizes)[0] for row in rows]
        pixels, grids = noise(self._images, self._pixel_shape(), self._sizes * len(rows), seed=0)
        prompt = {"input_ids": torch.stack(rows), PIXELS["image"]: pixels.to(self._model.dtype)}
        if grids is not None:
            prompt[GRIDS["image"]] = grids
        seen = prompt["input_ids"] == self._images.tokens["image"]
        kinds = "mm_token_type_ids" if self._images.merge else "token_type_ids"
        return self._on_device(prompt | {kinds: seen.int()})

    def _pixel_shape(self) -> list[int]:
        """Of a patch, or of an image where all have one size."""
        vision = self._model.config.vision_config
        if self._images and self._images.merge:
            return [vision.in_channels * vision.temporal_patch_size * vision.patch_size**2]
        return [vision.num_channels, vision.image_size, vision.image_size]

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._model.device) for name, tensor in tensors.items()}

    def begin(self, prompt: dict[str, Tensor], steps: int) -> None:
        self._output: Any = None

    @torch.no_grad()
    def see(self, prompt: dict[str, Tensor]) -> None:
        """The model's own method, which prefill then finds done: `mm_encoder_outputs`, which says the same, is newer
        than the oldest transformers that is allowed.
        """
        if PIXELS["image"] not in prompt:
            return
        inner: Any = self._model.model
        inner.__dict__.pop("get_image_features", None)
        given = {name: prompt[name] for name in (PIXELS["image"], GRIDS["image"]) if name in prompt}
        features = inner.get_image_features(**given, return_dict=True)
        inner.get_image_features = lambda *_, **__: features
        self._wait()

    @torch.no_grad()
    def prefill(self, prompt: dict[str, Tensor]) -> None:
        self._output = self._model(**prompt, use_cache=True, logits_to_keep=1)
        self._wait()

    def _wait(self) -> None:
        """Until the GPU, where there is one, has computed what was asked of it."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()

    def likeliest(self) -> list[int]:
        return self._output.logits[:, -1].argmax(-1).tolist()

    def pick(self) -> list[int]:
        self._tokens = self._output.logits[:, -1].argmax(-1)
        return self._tokens.tolist()

    @torch.no_grad()
    def step(self) -> list[int]:
        past = {CACHE: getattr(self._output, CACHE)}
        self._output = self._model(input_ids=self._tokens[:, None], use_cache=True, **past)
        return self.pick()

    def end(self) -> None:
        del self._output
