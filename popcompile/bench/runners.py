"""One way to run each kind of subject of a benchmark: prompt in, first tokens out, then greedy steps.

A worker (worker.py) times these, in this order: `begin` (an empty cache), `see` (the prompt's images), `prefill`,
`pick`, and `step` for every further token; then, untimed, `end`. Prompts come as `encode` made them. What a subject
needs is imported by its own runner, so that a worker's memory is the subject's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS
from popcompile.loading import one_line

_SILENT = 4  # ONNX Runtime's log severity: its errors are raised as well


class Runner(Protocol):
    """Runs one subject. Every row of a batch has the same number of tokens."""

    def encode(self, ids: list[list[int]]) -> Any:
        """A prompt of tokens [batch, tokens] and the images that the runner has, in the subject's own form."""
        ...

    def begin(self, prompt: Any, steps: int) -> None:
        """Make an empty cache for the prompt and `steps` tokens after it."""
        ...

    def see(self, prompt: Any) -> None:
        """Encode the prompt's images, where it has any."""
        ...

    def prefill(self, prompt: Any) -> None:
        """Encode the prompt: the last token's logits are there."""
        ...

    def likeliest(self) -> list[int]:
        """The first token of every row that `pick` will take."""
        ...

    def pick(self) -> list[int]:
        """Take the first token of every row."""
        ...

    def step(self) -> list[int]:
        """Feed what was taken last, and take the most likely token of every row."""
        ...

    def end(self) -> None:
        """Let go of the cache and the logits."""
        ...


def open_runner(subject: dict[str, Any], provider: str, threads: int, images: Sequence[Sequence[int]]) -> Runner:
    """The runner of a subject as subjects.Subject.to_json describes it. images: as ImagePackageRunner takes them, for
    packages and checkpoints alone.
    """
    if subject["kind"] == "transformers":
        from popcompile.bench.transformers_runner import TransformersRunner
        from popcompile.package.image_inputs import ImageInputs

        inputs = ImageInputs(**subject["images"]) if subject["images"] else None
        sizes = [(rows, columns) for rows, columns in images]
        return TransformersRunner(Path(subject["path"]), subject["dtype"], provider, threads, sizes, inputs)
    if images:
        return ImagePackageRunner(Path(subject["path"]), provider, threads, images)
    if subject["kind"] == "package":
        return PackageRunner(Path(subject["path"]), provider, threads)
    if subject["kind"] == "genai":
        return GenaiRunner(Path(subject["path"]), provider, threads)
    return OnnxRunner(subject["decoder"], provider, threads)


class PackageRunner:
    """A popcompile package through its own runtime."""

    def __init__(self, folder: Path, provider: str, threads: int) -> None:
        import torch

        from popcompile.runtime.session import Runtime

        torch.set_num_threads(1)  # as `generate` does
        self._torch = torch
        self._runtime = Runtime(folder, provider=provider, threads=threads)

    def encode(self, ids: list[list[int]]) -> Any:
        return [self._torch.tensor(row) for row in ids]

    def begin(self, prompt: Any, steps: int) -> None:
        self._cache = self._runtime.new_cache(len(prompt))

    def see(self, prompt: Any) -> None:
        pass

    def prefill(self, prompt: Any) -> None:
        self._logits = self._runtime.feed(prompt, self._cache, "prefill")

    def likeliest(self) -> list[int]:
        return self._logits[:, -1].numpy().argmax(-1).tolist()

    def pick(self) -> list[int]:
        self._tokens = self.likeliest()
        return self._tokens

    def step(self) -> list[int]:
        tokens = [self._torch.tensor([token]) for token in self._tokens]
        self._logits = self._runtime.feed(tokens, self._cache, "prefill")
        return self.pick()

    def end(self) -> None:
        del self._cache, self._logits


class ImagePackageRunner(PackageRunner):
    """A package whose prompts have images of noise in every row."""

    def __init__(self, folder: Path, provider: str, threads: int, images: Sequence[Sequence[int]]) -> None:
        """images: rows and columns of each, in tokens."""
        super().__init__(folder, provider, threads)
        self._sizes = [(rows, columns) for rows, columns in images]
        self._runtime.open("vision")

    def encode(self, ids: list[list[int]]) -> Any:
        from popcompile.runtime.noise import make_pixels, make_prompt

        inputs = self._runtime.manifest.images
        assert inputs is not None
        prompts = [make_prompt(inputs, row, self._sizes) for row in super().encode(ids)]
        self._places = prompts[0][1]
        self._pixels = make_pixels(self._runtime, self._sizes * len(ids), seed=0)
        return [row for row, _ in prompts]

    def see(self, prompt: Any) -> None:
        from popcompile.runtime.embeddings import RowImages

        features = self._runtime.encode_images(*self._pixels)
        self._images = [RowImages(row, self._places) for row in features.chunk(len(prompt))]

    def prefill(self, prompt: Any) -> None:
        self._logits = self._runtime.feed(prompt, self._cache, "prefill", images=self._images)


@contextlib.contextmanager
def _worded(graph: str, what: str) -> Iterator[None]:
    """ONNX Runtime's exceptions, which have nothing else in common, as one line that names the graph."""
    try:
        yield
    except Exception as error:
        import onnxruntime as ort

        raise PopcompileError(
            f"{graph}: {what} onnxruntime {ort.__version__}: {one_line(error)}; build it again, or leave it out of"
            " --against"
        ) from error


class OnnxRunner:
    """A single graph through ONNX Runtime itself. The cache stays in OrtValues, where the provider wants it.

    What a step returns is the next one's past. Where the graph can write into its cache (`in_place`), the first step
    moves it into buffers with room for all that follow, as `Runtime` does; ONNX Runtime would copy it at every step.
    """

    def __init__(self, decoder: dict[str, Any], provider: str, threads: int) -> None:
        import onnxruntime as ort

        self._ort, self._decoder = ort, decoder
        chosen = PROVIDERS[provider]
        self._in_place = decoder["in_place"] and chosen.on_host
        self._device = chosen.device
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = threads
        with _worded(decoder["graph"], "does not load in"):
            self._session = ort.InferenceSession(decoder["graph"], options, providers=[chosen.name], enable_fallback=0)

    def encode(self, ids: list[list[int]]) -> Any:
        return np.array(ids, dtype=self._decoder["ids_dtype"])

    def begin(self, prompt: Any, steps: int) -> None:
        self._steps, self._fed = steps, 0
        self._binding: Any = None  # of the cache, once it is in buffers with room
        self._cache = []
        for (heads, size), window in zip(self._decoder["cache_shapes"], self._decoder["windows"], strict=True):
            empty = np.zeros((len(prompt), heads, window, size), dtype=self._decoder["cache_dtype"])
            self._cache.append(self._value(empty, self._device))

    def see(self, prompt: Any) -> None:
        pass

    def prefill(self, prompt: Any) -> None:
        self._feed(prompt)

    def likeliest(self) -> list[int]:
        return self._logits[:, -1].argmax(-1).tolist()

    def pick(self) -> list[int]:
        self._tokens = self._logits[:, -1].argmax(-1).astype(self._decoder["ids_dtype"])
        return self._tokens.tolist()

    def step(self) -> list[int]:
        if self._in_place and self._binding is None:
            self._make_room()
        self._feed(self._tokens[:, None])
        return self.pick()

    def _make_room(self) -> None:
        """Move the cache into buffers that every step binds as past and as present."""
        for index, (value, window) in enumerate(zip(self._cache, self._decoder["windows"], strict=True)):
            if not window:
                batch, heads, tokens, size = value.shape()
                buffer = np.zeros((batch, heads, tokens + self._steps, size), dtype=self._decoder["cache_dtype"])
                buffer[:, :, :tokens] = np.from_dlpack(value)
                self._cache[index] = self._value(buffer)
        self._binding = self._session.io_binding()
        self._binding.bind_output(self._decoder["logits"], "cpu")  # first, and so first of what a step returns
        for past, present, value in zip(self._decoder["past"], self._decoder["present"], self._cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def _feed(self, ids: Any) -> None:
        """Append tokens [batch, tokens] to the cache; the logits are then those of them, or of the last one."""
        decoder = self._decoder
        batch, tokens = ids.shape
        total = self._fed + tokens
        binding = self._binding or self._session.io_binding()
        binding.bind_ortvalue_input(decoder["ids"], self._value(np.ascontiguousarray(ids)))
        if decoder["mask"]:
            binding.bind_ortvalue_input(decoder["mask"], self._value(np.ones((batch, total), dtype=ids.dtype)))
        if decoder["positions"]:
            positions = np.tile(np.arange(self._fed, total, dtype=ids.dtype), (batch, 1))
            binding.bind_ortvalue_input(decoder["positions"], self._value(positions))
        binding.bind_output(decoder["logits"], "cpu")
        if self._binding is None:
            names = zip(decoder["past"], decoder["present"], decoder["windows"], strict=True)
            for (past, present, window), value in zip(names, self._cache, strict=True):
                binding.bind_ortvalue_input(past, value)
                if window:
                    binding.bind_ortvalue_output(present, value)
                else:
                    binding.bind_output(present, self._device)
        with _worded(decoder["graph"], "fails in"):
            self._session.run_with_iobinding(binding)
        logits, *self._cache = binding.get_outputs()
        self._logits = np.from_dlpack(logits)
        self._fed = total

    def _value(self, array: Any, device: str = "cpu") -> Any:
        """An OrtValue that keeps the array alive, as those of `ortvalue_from_numpy` do not once they are bound."""
        if device == "cpu":
            return self._ort.OrtValue.from_dlpack(array)
        return self._ort.OrtValue.ortvalue_from_numpy(array, device)

    def end(self) -> None:
        del self._cache, self._logits, self._binding


class GenaiRunner:
    """A model folder through onnxruntime-genai, as its own examples generate."""

    def __init__(self, folder: Path, provider: str, threads: int) -> None:
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(str(folder))
        config.clear_providers()
        if PROVIDERS[provider].genai_options:
            config.append_provider(provider)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        described = json.loads((folder / "genai_config.json").read_bytes())["model"]["decoder"]
        self._window = described.get("sliding_window", {}).get("window_size", 0)

    def encode(self, ids: list[list[int]]) -> Any:
        return np.array(ids, dtype=np.int32)

    def begin(self, prompt: Any, steps: int) -> None:
        params = self._og.GeneratorParams(self._model)
        length = prompt.shape[1] + steps + 1
        params.set_search_options(
            batch_size=len(prompt),
            max_length=max(length, self._window),  # genai makes the cache of so many slots, and no window is wider
            min_length=length,  # no token ends the text before the last step
            do_sample=False,
            num_beams=1,
        )
        self._generator: Any = self._og.Generator(self._model, params)

    def see(self, prompt: Any) -> None:
        pass

    def prefill(self, prompt: Any) -> None:
        self._generator.append_tokens(prompt)

    def likeliest(self) -> list[int]:
        return np.asarray(self._generator.get_logits())[:, -1].argmax(-1).tolist()

    def pick(self) -> list[int]:
        self._generator.generate_next_token()
        return [int(token) for token in self._generator.get_next_tokens()]

    step = pick

    def end(self) -> None:
        del self._generator
