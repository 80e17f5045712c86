"""Run a package's graphs with ONNX Runtime: one mapping of the weights, a cache that the graphs write in place.

Tokens come in as rows of unequal length and are padded on the right. Slot j of a cache row holds the token at position
j, which is how the graphs count (passes/ops.py). ONNX Runtime's GroupQueryAttention takes a batch in three cases:

    first tokens (empty cache)     rows of any lengths, padded
    one token per row (decode)     rows with pasts of any lengths
    several tokens after a past    one row at a time
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from onnx import GraphProto, TensorProto
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popcompile.errors import PopcompileError
from popcompile.export.io_names import IMAGE_OUTPUTS
from popcompile.export.precisions import FLOATS
from popcompile.files import require_utf8
from popcompile.loading import one_line
from popcompile.package.graph_check import read_graphs
from popcompile.package.integrity import check_small_files, open_weights
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.runtime.batch import Batch
from popcompile.runtime.cache import KVCache, to_ort, to_torch
from popcompile.runtime.embeddings import Embeddings, RowImages
from popcompile.runtime.images import encode_grids, encode_images
from popcompile.runtime.integers import made_exact, saturates
from popcompile.runtime.providers import find_provider, unusable
from popcompile.runtime.weights import SharedWeights

Stage = Literal["prefill", "decode"]
#: bytes of logits that a full prefill makes at once where only the last token's are asked for
_LOGITS_BYTES = 256 << 20
#: the precision and PyTorch's type of what a graph computes in, by ONNX Runtime's name of the type
_PRECISIONS = {precision.onnx_type: name for name, precision in FLOATS.items()}
_TYPES = {precision.onnx_type: getattr(torch, str(precision.torch_dtype)) for precision in FLOATS.values()}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16}
_SILENT = 4  # ONNX Runtime's log severity: its errors are raised as well, and reported once
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class SessionPolicy(NamedTuple):
    """How the session of a graph is opened.

    packs: whether it keeps, on the CPU, matrices packed for their kernels. ONNX Runtime cannot share what is packed
        between sessions, so only the main graph's does, unless weights are quantized: unpacked ones of those would be
        widened to fp32 at every call.
    spins: whether its threads wait actively for more work. Those of a second session would take the cores from the
        main one's.
    """

    packs: bool
    spins: bool

    @classmethod
    def of(cls, *, main: bool, quantized: bool, low_memory: bool) -> SessionPolicy:
        """low_memory: every session reads the mapped weights as they are, so that there is a single copy of them."""
        return cls(packs=not low_memory and (main or quantized), spins=not low_memory and main)


class Runtime:
    """The graphs of one package, ready to run.

    main: the graph that is loaded at once and that single tokens go through: "prefill", or "decode" where prompts are
    encoded in full. The other is opened when it is first asked for. low_memory: one copy of the weights for both
    (SessionPolicy). fp16 weights save nothing on the CPU, where ONNX Runtime widens them to fp32 in every session.
    threads: of each session on the CPU; None: as many as it has cores.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        provider: str = "cpu",
        main: Stage = "prefill",
        low_memory: bool = False,
        threads: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.main = main
        self._low_memory = low_memory
        self._threads = threads
        require_utf8(self.folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.provider = find_provider(provider)
        check_small_files(self.folder, self.manifest)
        with open_weights(self.folder, self.manifest) as file:
            self._weights = SharedWeights(file, self.provider.device)
            self._weights_file = os.fstat(file.fileno())
        #: until they are opened
        self._graphs = read_graphs(self.folder, self.manifest)
        self._cache_inputs = [n for n in self.manifest.inputs if n.startswith("past_key_values.")]
        self._cache_outputs = [n for n in self.manifest.outputs if n.startswith("present.")]
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._is_closed = False
        session = self.open(main)
        types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
        #: of the logits
        self.dtype = _TYPES[types["logits"]]
        #: of the cache, and of embeddings
        self.cache_dtype = _TYPES[types[self._cache_inputs[0]]]
        images = self.manifest.images
        self._embeddings = Embeddings(images, self.embed, self.cache_dtype) if images is not None else None

    @property
    def packs(self) -> bool:
        """Whether the main graph's session has packed matrices, which the other graph's may lack or would add."""
        return self.provider.on_host and self._policy(self.main).packs

    def _policy(self, stage: str) -> SessionPolicy:
        if stage in IMAGE_OUTPUTS:  # nobody shares their matrices, and the decoder runs right after them
            return SessionPolicy(packs=not self._low_memory, spins=False)
        return SessionPolicy.of(main=stage == self.main, quantized=self.manifest.quantized, low_memory=self._low_memory)

    def close(self) -> None:
        """End the sessions and let go of the weights. What was encoded stays readable."""
        self._sessions.clear()
        self._graphs.clear()
        self._weights.close()
        self._is_closed = True

    def open(self, stage: str) -> ort.InferenceSession:
        """The session of a graph, loaded now unless it is already. Raises PopcompileError where it does not load,
        where the package has none, and after `close`.
        """
        if self._is_closed:
            raise PopcompileError(f"{self.folder}: was closed; load it again")
        if stage not in self._sessions:
            self._sessions[stage] = self._open(stage)
            if self.provider.on_host:
                self._weights.release_pages()
        return self._sessions[stage]

    def _open(self, stage: str) -> ort.InferenceSession:
        if stage not in self.manifest.graphs:
            raise PopcompileError(
                f"{self.folder}: has no graph of the full model, for it has the {self.manifest.layout} layout; convert"
                " with --layout split"
            )
        options, policy = ort.SessionOptions(), self._policy(stage)
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = self._threads or 0
        options.enable_mem_pattern = False  # of use where shapes come again, and every token has longer ones
        if not policy.packs:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if not policy.spins:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        # ONNX Runtime asks that the weights be there, and reads those that it converts when it opens a graph
        options.add_session_config_entry(_WEIGHTS_FOLDER, os.path.realpath(self.folder))
        content, graph = self._graphs[stage]
        try:
            if stage not in IMAGE_OUTPUTS:
                self._require_kernels(graph)
            flipped: frozenset[str] = frozenset()
            if self.provider.on_host and self.manifest.quantized and saturates():
                content, graph, flipped = made_exact(content)
            self._weights.add_to(options, graph, flipped)
            self._require_same_weights()
            session = ort.InferenceSession(content, options, providers=[self.provider.name], enable_fallback=0)
        except PopcompileError:
            raise
        except Exception as error:
            self._require_same_weights()
            if not self.provider.on_host:
                raise PopcompileError(unusable(self.provider, one_line(error))) from error
            raise PopcompileError(
                f"{self.folder}: {self.manifest.graphs[stage]} does not load in onnxruntime {ort.__version__}:"
                f" {one_line(error)}; upgrade it, or convert the model again"
            ) from error
        self._require_same_weights()
        del self._graphs[stage]
        if session.get_providers()[0] != self.provider.name:
            raise PopcompileError(unusable(self.provider, "it fell back to the CPU"))
        return session

    def _require_same_weights(self) -> None:
        """The graph that opens now belongs to the weights that were mapped at first."""
        try:
            there = os.stat(self.folder / self.manifest.weights)
        except OSError:
            there = None
        if there is None or not os.path.samestat(there, self._weights_file):
            raise PopcompileError(f"{self.folder}: was replaced or removed after it was loaded; load it again")

    def _require_kernels(self, graph: GraphProto) -> None:
        types = {i.name: TensorProto.DataType.Name(i.type.tensor_type.elem_type) for i in graph.input}
        dtype = _PRECISIONS.get(f"tensor({types[self._cache_inputs[0]].lower()})")
        if dtype not in self.provider.dtypes:
            device = self.provider.device
            raise PopcompileError(
                f"{self.folder}: computes in {dtype}, which ONNX Runtime's attention has no kernels for on {device};"
                f" convert with --provider {device}"
            )

    # --- running -----------------------------------------------------------------------------------------------

    def new_cache(self, batch: int) -> KVCache:
        """A cache without tokens."""
        shape = (batch, self.manifest.num_kv_heads, 0, self.manifest.head_size)
        empty = torch.zeros(shape, dtype=self.cache_dtype)
        device = self.provider.device
        return KVCache([to_ort(empty, device) for _ in self._cache_inputs], [0] * batch, device)

    def encode_images(self, pixel_values: Tensor, grids: Tensor | None) -> Tensor:
        """Features [image tokens, W] of images as the processor gives them, in their order, for `feed`.

        grids: [images, 3], where images have any size. Raises PopcompileError where they do not fit.
        """
        images = self.manifest.images
        assert images is not None
        session, pixels = self.open("vision"), pixel_values.float().numpy()
        try:
            if grids is None:
                features = encode_images(session, pixels)
            else:
                features = encode_grids(session, pixels, grids.numpy(), images.merge)
        except PopcompileError:
            raise
        except Exception as error:
            raise self._failure("vision", error) from error
        if self._low_memory:
            del self._sessions["vision"]
            self._graphs["vision"] = read_graphs(self.folder, self.manifest)["vision"]
        return torch.from_numpy(features)

    def embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Embeddings [B, S, W] of ids [B, S] and the features [n, W] of image tokens.

        features: None for the graph that embeds text alone, which not every package has.
        """
        stage, values = "text_embedding", {"input_ids": to_ort(ids.contiguous())}
        if features is not None:
            stage, values = "embedding", values | {"image_features": to_ort(features.contiguous())}
        session = self.open(stage)
        try:
            return to_torch(session.run_with_ort_values(["inputs_embeds"], values)[0])
        except Exception as error:
            raise self._failure(stage, error) from error

    def _batch(
        self,
        rows: Sequence[Tensor],
        lengths: Sequence[int],
        deltas: Sequence[int],
        images: Sequence[RowImages | None] | None = None,
    ) -> tuple[Batch, list[int]]:
        """What graphs are given of rows of ids, and how far positions are behind slots after them."""
        if self._embeddings is not None:
            return self._embeddings.batch(rows, lengths, deltas, images)
        ids = rows[0][None] if len(rows) == 1 else pad_sequence(list(rows), batch_first=True)
        return Batch({"input_ids": ids}, [len(row) for row in rows]), list(deltas)

    def feed(
        self,
        rows: Sequence[Tensor],
        cache: KVCache,
        stage: Stage,
        *,
        every_token: bool = False,
        images: Sequence[RowImages | None] | None = None,
    ) -> Tensor:
        """Append `rows` (new tokens of every row, [tokens] int64 each, at least one) to the cache.

        stage: "prefill" encodes them as a prompt, skipping the pruned layers for all but each row's window;
        "decode" runs the whole model. A single token is a boundary token, for which the two are the same.
        every_token: logits [B, S, vocabulary] of every token, right-padded, in place of the last ones' [B, 1,
        vocabulary]; for "decode" only. images: of every row. Takes tokens and lengths as they are: the caller checks
        them.
        """
        batch, deltas = self._batch(rows, cache.lengths, cache.deltas, images)
        logits = self._feed(batch, cache, stage, every_token)
        cache.deltas = deltas
        return logits

    def _feed(self, batch: Batch, cache: KVCache, stage: Stage, every_token: bool) -> Tensor:
        rows = len(batch.counts)
        if batch.longest == 1:
            return self._call(self.main, batch, [n + 1 for n in cache.lengths], cache)
        if not any(cache.lengths):
            size = rows * batch.longest * self.manifest.vocab_size * self.dtype.itemsize
            if stage == "prefill" or every_token or size <= _LOGITS_BYTES:
                return self._first(batch, cache, stage, every_token)
        if rows == 1:
            return self._continue(batch, cache, stage, every_token)
        caches = [cache.row(b) for b in range(rows)]
        logits = [self._feed(batch.row(b), caches[b], stage, every_token)[0] for b in range(rows)]
        cache.assign(caches)
        return pad_sequence(logits, batch_first=True)

    def run(
        self,
        stage: Stage,
        input_ids: Tensor,
        lengths: Sequence[int],
        cache: KVCache,
        images: Sequence[RowImages | None] | None = None,
    ) -> Tensor:
        """One call of a graph, with the new tokens input_ids [B, S] padded on the right; returns its logits.

        lengths: tokens of every row with the new ones, whose entries go to the cache's slots [T - S, T), T being the
        largest length. images: of every row, among the new tokens.
        """
        before = [max(0, length - input_ids.shape[1]) for length in lengths]
        batch, deltas = self._batch(list(input_ids), before, cache.deltas, images)
        logits = self._call(stage, batch, lengths, cache)
        cache.deltas = deltas
        return logits

    def _call(self, stage: Stage, batch: Batch, lengths: Sequence[int], cache: KVCache) -> Tensor:
        total = max(lengths)
        cache.reserve(total)
        binding = cache.bindings.get(stage)
        if binding is None:
            binding = cache.bindings[stage] = self.open(stage).io_binding()
            for source, target, value in zip(self._cache_inputs, self._cache_outputs, cache.values, strict=True):
                binding.bind_ortvalue_input(source, value)
                binding.bind_ortvalue_output(target, value)
        shape = (len(lengths), 1 if stage == "prefill" else batch.longest, self.manifest.vocab_size)
        logits = torch.empty(shape, dtype=self.dtype)
        binding.bind_output("logits", "cpu", 0, _NUMPY[self.dtype], shape, logits.data_ptr())
        for name, value in batch.values.items():
            if name == "position_ids":
                value = value.movedim(2, 0)
            binding.bind_ortvalue_input(name, to_ort(value.contiguous()))
        binding.bind_cpu_input("attention_mask", _mask(lengths))
        self._run(stage, binding)
        cache.lengths = list(lengths)
        return logits

    def _first(self, batch: Batch, cache: KVCache, stage: Stage, every_token: bool) -> Tensor:
        logits = self._call(stage, batch, batch.counts, cache)
        if every_token or stage == "prefill":
            return logits
        return logits[torch.arange(len(batch.counts)), torch.tensor(batch.counts) - 1][:, None]

    def _continue(self, batch: Batch, cache: KVCache, stage: Stage, every_token: bool) -> Tensor:
        """Several tokens of one row. Where only the last logits are asked for, a full prefill goes in pieces."""
        piece = batch.longest
        if stage == "decode" and not every_token:
            piece = max(1, _LOGITS_BYTES // (self.manifest.vocab_size * self.dtype.itemsize))
        for part in batch.split(piece):
            logits = self._call(stage, part, [cache.lengths[0] + part.longest], cache)
        return logits if every_token else logits[:, -1:]

    def _run(self, stage: Stage, binding: ort.IOBinding) -> None:
        try:
            self.open(stage).run_with_iobinding(binding)
        except PopcompileError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions have nothing else in common
            raise self._failure(stage, error) from error

    def _failure(self, stage: str, error: Exception) -> PopcompileError:
        return PopcompileError(
            f"{self.folder}: {self.manifest.graphs[stage]} fails in onnxruntime {ort.__version__}:"
            f" {one_line(error)}; `popcompile verify` checks the package, or convert the model again"
        )


def _mask(lengths: Sequence[int]) -> np.ndarray[Any, Any]:
    """[B, T] int64, ones for each row's first `lengths` slots."""
    mask = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return mask
