"""Run a package's graphs with ONNX Runtime: one mapping of the weights, a cache that the graphs write in place.

Tokens come in as rows of unequal length and are padded on the right. Slot j of a cache row holds the token at position
j, which is how the graphs count (passes/ops.py). ONNX Runtime's GroupQueryAttention takes a batch in three cases:

    first tokens (empty cache)     rows of any lengths, padded
    one token per row (decode)     rows with pasts of any lengths
    several tokens after a past    one row at a time
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.utils.dlpack
from onnx.external_data_helper import uses_external_data
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS, Provider
from popcompile.files import require_utf8
from popcompile.loading import one_line
from popcompile.package.graph_check import read_graphs
from popcompile.package.integrity import check_small_files, open_weights
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.runtime.gpu import has_gpu
from popcompile.upstream import memory_map

Stage = Literal["prefill", "decode"]

#: bytes of logits that a full prefill makes at once where only the last token's are asked for
_LOGITS_BYTES = 256 << 20
#: slots by which a cache grows, at least
_CACHE_STEP = 256
_DTYPES = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16}
_SILENT = 4  # ONNX Runtime's log severity: its errors are raised as well, and reported once
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


# --- the cache -------------------------------------------------------------------------------------------------


@dataclass
class KVCache:
    """Keys and values of every layer, in the order of the graphs' inputs.

    values: [batch, kv_heads, slots, head_size] each, on the provider's device; the graphs write into them.
    lengths: tokens of every row; slots past them hold nothing that is read.
    """

    values: list[ort.OrtValue]
    lengths: list[int]
    device: str = "cpu"
    #: of a stage's session to `values`, as input and output, while they stay
    bindings: dict[str, ort.IOBinding] = field(default_factory=dict, repr=False)

    @property
    def slots(self) -> int:
        return int(self.values[0].shape()[2])

    def tensors(self) -> list[Tensor]:
        """What holds tokens, as torch tensors on the CPU: views, where the values live there."""
        used = max(self.lengths)
        return [_to_torch(v)[:, :, :used] for v in self.values]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        self.values = [_to_ort(t, self.device) for t in tensors]
        self.bindings = {}

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens a row, and for some after them."""
        if slots <= self.slots:
            return
        shape, kind = self.values[0].shape(), self.values[0].element_type()
        shape[2] = slots + max(_CACHE_STEP, slots // 4)
        if any(self.lengths):
            self.replace([_widen(t, shape) for t in self.tensors()])
        else:
            self.values = [ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self.device) for _ in self.values]
            self.bindings = {}

    def row(self, index: int) -> KVCache:
        """A cache of one row, without the slots that it does not use."""
        length = self.lengths[index]
        rows = (t[index : index + 1, :, :length].contiguous() for t in self.tensors())
        return KVCache([_to_ort(t, self.device) for t in rows], [length], self.device)

    def assign(self, rows: Sequence[KVCache]) -> None:
        """Take the rows of other caches, one each, in place of those held."""
        self.lengths = [r.lengths[0] for r in rows]
        slots = max(self.lengths)
        padded = ([_widen(t, (*t.shape[:2], slots, t.shape[3])) for t in r.tensors()] for r in rows)
        self.replace([torch.cat(parts) for parts in zip(*padded, strict=True)])

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        values = [_to_ort(t.clone(memory_format=torch.contiguous_format), self.device) for t in self.tensors()]
        return KVCache(values, copy.copy(self.lengths), self.device)


def _widen(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor at the beginning of a larger one."""
    wider = tensor.new_empty(tuple(shape))
    wider[:, :, : tensor.shape[2]] = tensor
    return wider


def _to_torch(value: ort.OrtValue) -> Tensor:
    return torch.utils.dlpack.from_dlpack(_on_device(value, "cpu"))


def _to_ort(tensor: Tensor, device: str = "cpu") -> ort.OrtValue:
    return _on_device(ort.OrtValue.from_dlpack(tensor), device)  # owns the tensor, as do torch tensors made of it later


def _on_device(value: ort.OrtValue, device: str) -> ort.OrtValue:
    """The value, or a copy of it where it lives elsewhere."""
    if value.device_name() == device:
        return value
    copied = ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), device)
    if all(value.shape()):
        copied.update_inplace(value)
    return copied


# --- weights ---------------------------------------------------------------------------------------------------


class SharedWeights:
    """The package's data file, mapped once, as initializers for any number of sessions.

    On the CPU the values are views of the mapping: pages of the file, shared by every session and process and given
    back by the system when memory is short. On another device each tensor is copied there once.
    """

    def __init__(self, file: Path | BinaryIO, device: str) -> None:
        """file: where it is, or the open one, which stays the same whatever takes its place in the folder."""
        self._file = np.memmap(file, dtype=np.uint8, mode="r")
        self._device = device
        self._values: dict[tuple[int, int, tuple[int, ...]], ort.OrtValue] = {}

    def add_to(self, options: ort.SessionOptions, graph: onnx.GraphProto) -> None:
        """Give a session the external initializers of its graph. The values must outlive the session."""
        for tensor in graph.initializer:
            if uses_external_data(tensor):
                options.add_initializer(tensor.name, self._value(tensor))

    def _value(self, tensor: onnx.TensorProto) -> ort.OrtValue:
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, shape = int(place.get("offset", 0)), tuple(tensor.dims)
        key = (start, tensor.data_type, shape)
        if key not in self._values:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if end > self._file.size:
                raise PopcompileError(f"{tensor.name} lies outside the weights file; convert the model again")
            array = self._file[start:end].view(dtype).reshape(shape)
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)  # numpy has no bf16
            if self._device != value.device_name():
                # an initializer may not own its memory: what comes by DLPack does not, and keeps its source
                value = ort.OrtValue.from_dlpack(_on_device(value, self._device))
            self._values[key] = value
        return self._values[key]

    def close(self) -> None:
        """Let go of the file, and of what was copied to a GPU; no session may need them any more."""
        self._values.clear()
        del self._file

    def release_pages(self) -> None:
        """Let go of the pages read so far; they are mapped again when something reads them."""
        mapping = memory_map(self._file)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)


# --- sessions --------------------------------------------------------------------------------------------------


def find_provider(name: str) -> Provider:
    """The provider called `name`. Raises PopcompileError where there is none, or where it cannot run here."""
    if name not in PROVIDERS:
        raise PopcompileError(f"provider {name}: unknown; choose one of {', '.join(PROVIDERS)}")
    provider = PROVIDERS[name]
    if provider.name not in ort.get_available_providers():
        raise PopcompileError(
            f"provider {name}: this onnxruntime {ort.__version__} has no {provider.name};"
            ' pip uninstall onnxruntime, then pip install onnxruntime-gpu, or use provider="cpu"'
        )
    if name == "cuda" and not has_gpu():
        raise PopcompileError(
            'provider cuda: no NVIDIA GPU with a working driver was found; install the driver, or use provider="cpu"'
        )
    if name == "cuda":
        try:
            _load_cuda_libraries()
        except OSError as error:
            raise PopcompileError(_unusable(provider, one_line(error))) from error
    return provider


def _unusable(provider: Provider, reason: str) -> str:
    return (
        f"provider {provider.device}: onnxruntime {ort.__version__} cannot use it ({reason}); pip install"
        ' "onnxruntime-gpu[cuda,cudnn]" for the libraries of CUDA, or use provider="cpu"'
    )


def _load_cuda_libraries() -> None:
    """Load what ONNX Runtime's CUDA provider needs, from pip packages where there are some.

    Raises OSError naming the missing library; ONNX Runtime itself would log it and go on without the provider.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    pattern = "onnxruntime_providers_{}.dll" if os.name == "nt" else "libonnxruntime_providers_{}.so"
    for part in ("shared", "cuda"):
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / pattern.format(part)), mode=ctypes.RTLD_GLOBAL)


class Runtime:
    """The graphs of one package, ready to run.

    main: the graph that is loaded at once and that single tokens go through: "prefill", or "decode" where prompts are
    encoded in full. On the CPU its session holds the matrices packed for their kernels. ONNX Runtime cannot share what
    is packed between sessions, so the other graph, opened when it is first asked for, reads the mapped weights as they
    are, unless they are quantized: then it packs its own, for unpacked ones are widened to fp32 at every call.
    low_memory: let both read the mapped weights, so that there is a single copy of them. (fp16 weights save nothing on
    the CPU, where ONNX Runtime widens them to fp32 in every session.) threads: of each session on the CPU; None: as
    many as it has cores.
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
        self._cache_dtype = _TYPES[types[self._cache_inputs[0]]]

    @property
    def packs(self) -> bool:
        """Whether the main graph's session has packed matrices, which the other graph's may lack or would add."""
        return self.provider.device == "cpu" and not self._low_memory

    def close(self) -> None:
        """End the sessions and let go of the weights. What was encoded stays readable."""
        self._sessions.clear()
        self._graphs.clear()
        self._weights.close()
        self._is_closed = True

    def open(self, stage: Stage) -> ort.InferenceSession:
        """The session of a graph, loaded now unless it is already. Raises PopcompileError where it does not load,
        where the package has none, and after `close`.
        """
        if self._is_closed:
            raise PopcompileError(f"{self.folder}: was closed; load it again")
        if stage not in self._sessions:
            self._sessions[stage] = self._open(stage)
            if self.provider.device == "cpu":
                self._weights.release_pages()
        return self._sessions[stage]

    def _open(self, stage: str) -> ort.InferenceSession:
        if stage not in self.manifest.graphs:
            raise PopcompileError(
                f"{self.folder}: has no graph of the full model, for it has the {self.manifest.layout} layout; convert"
                " with --layout split"
            )
        options = ort.SessionOptions()
        accelerated = self.provider.device != "cpu"
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = self._threads or 0
        options.enable_mem_pattern = False  # of use where shapes come again, and every token has longer ones
        if self._low_memory or not (stage == self.main or self.manifest.quantized):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._low_memory or stage != self.main:
            # its threads, waiting actively for more, would take the cores from the main session's
            options.add_session_config_entry("session.force_spinning_stop", "1")
        # ONNX Runtime asks that the weights be there, and reads those that it converts when it opens a graph
        options.add_session_config_entry(_WEIGHTS_FOLDER, os.path.realpath(self.folder))
        content, graph = self._graphs[stage]
        try:
            self._require_kernels(graph)
            self._weights.add_to(options, graph)
            self._require_same_weights()
            session = ort.InferenceSession(content, options, providers=[self.provider.name], enable_fallback=0)
        except PopcompileError:
            raise
        except Exception as error:
            self._require_same_weights()
            if accelerated:
                raise PopcompileError(_unusable(self.provider, one_line(error))) from error
            raise PopcompileError(
                f"{self.folder}: {self.manifest.graphs[stage]} does not load in onnxruntime {ort.__version__}:"
                f" {one_line(error)}; upgrade it, or convert the model again"
            ) from error
        self._require_same_weights()
        del self._graphs[stage]
        if session.get_providers()[0] != self.provider.name:
            raise PopcompileError(_unusable(self.provider, "it fell back to the CPU"))
        return session

    def _require_same_weights(self) -> None:
        """The graph that opens now belongs to the weights that were mapped at first."""
        try:
            there = os.stat(self.folder / self.manifest.weights)
        except OSError:
            there = None
        if there is None or not os.path.samestat(there, self._weights_file):
            raise PopcompileError(f"{self.folder}: was replaced or removed after it was loaded; load it again")

    def _require_kernels(self, graph: onnx.GraphProto) -> None:
        types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
        dtype = _DTYPES.get(types[self._cache_inputs[0]])
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
        empty = torch.zeros(shape, dtype=self._cache_dtype)
        device = self.provider.device
        return KVCache([_to_ort(empty, device) for _ in self._cache_inputs], [0] * batch, device)

    def feed(self, rows: Sequence[Tensor], cache: KVCache, stage: Stage, *, every_token: bool = False) -> Tensor:
        """Append `rows` (new tokens of every row, [tokens] int64 each, at least one) to the cache.

        stage: "prefill" encodes them as a prompt, skipping the pruned layers for all but each row's window;
        "decode" runs the whole model. A single token is a boundary token, for which the two are the same.
        every_token: logits [B, S, vocabulary] of every token, right-padded, in place of the last ones' [B, 1,
        vocabulary]; for "decode" only. Takes tokens and lengths as they are: the caller checks them.
        """
        batch, longest = len(rows), max(len(r) for r in rows)
        if longest == 1:
            ids = rows[0][None] if batch == 1 else torch.stack(list(rows))
            return self.run(self.main, ids, [n + 1 for n in cache.lengths], cache)
        if not any(cache.lengths):
            size = batch * longest * self.manifest.vocab_size * self.dtype.itemsize
            if stage == "prefill" or every_token or size <= _LOGITS_BYTES:
                return self._first(rows, cache, stage, every_token)
        if batch == 1:
            return self._continue(rows[0], cache, stage, every_token)
        caches = [cache.row(b) for b in range(batch)]
        logits = [self.feed([r], c, stage, every_token=every_token)[0] for r, c in zip(rows, caches, strict=True)]
        cache.assign(caches)
        return torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)

    def run(self, stage: Stage, input_ids: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        """One call of a graph, with the new tokens input_ids [B, S] padded on the right; returns its logits.

        lengths: tokens of every row with the new ones, whose entries go to the cache's slots [T - S, T), T being the
        largest length.
        """
        total = max(lengths)
        cache.reserve(total)
        binding = cache.bindings.get(stage)
        if binding is None:
            binding = cache.bindings[stage] = self.open(stage).io_binding()
            for source, target, value in zip(self._cache_inputs, self._cache_outputs, cache.values, strict=True):
                binding.bind_ortvalue_input(source, value)
                binding.bind_ortvalue_output(target, value)
        shape = (len(lengths), 1 if stage == "prefill" else input_ids.shape[1], self.manifest.vocab_size)
        logits = torch.empty(shape, dtype=self.dtype)
        binding.bind_output("logits", "cpu", 0, _NUMPY[self.dtype], shape, logits.data_ptr())
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids.numpy()))
        binding.bind_cpu_input("attention_mask", _mask(lengths))
        self._run(stage, binding)
        cache.lengths = list(lengths)
        return logits

    def _first(self, rows: Sequence[Tensor], cache: KVCache, stage: Stage, every_token: bool) -> Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = [len(r) for r in rows]
        logits = self.run(stage, ids, lengths, cache)
        if every_token or stage == "prefill":
            return logits
        return logits[torch.arange(len(rows)), torch.tensor(lengths) - 1][:, None]

    def _continue(self, tokens: Tensor, cache: KVCache, stage: Stage, every_token: bool) -> Tensor:
        """Several tokens of one row. Where only the last logits are asked for, a full prefill goes in pieces."""
        piece = len(tokens)
        if stage == "decode" and not every_token:
            piece = max(1, _LOGITS_BYTES // (self.manifest.vocab_size * self.dtype.itemsize))
        for part in tokens.split(piece):
            logits = self.run(stage, part[None], [cache.lengths[0] + len(part)], cache)
        return logits if every_token else logits[:, -1:]

    def _run(self, stage: Stage, binding: ort.IOBinding) -> None:
        try:
            self.open(stage).run_with_iobinding(binding)
        except PopcompileError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions have nothing else in common
            raise PopcompileError(
                f"{self.folder}: {self.manifest.graphs[stage]} fails in onnxruntime {ort.__version__}:"
                f" {one_line(error)}; `popcompile verify` checks the package, or convert the model again"
            ) from error


def _mask(lengths: Sequence[int]) -> np.ndarray[Any, Any]:
    """[B, T] int64, ones for each row's first `lengths` slots."""
    mask = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return mask
