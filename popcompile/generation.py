"""A package as a transformers model: PopForCausalLM generates like any causal LM, and its prompts are encoded pruned.

transformers pads batches on the left, and its attention mask covers everything fed so far, pads included. Here every
row is packed to the left without its pads; PopCache remembers which of the caller's columns were tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from popcompile.errors import PopcompileError
from popcompile.package_configs import read_config, read_generation_config
from popcompile.runtime import KVCache, Runtime, Stage

PREFILLS = ("auto", "pop", "full")

#: transformers types its mixin for PreTrainedModel, which this module's is not
_GenerationMixin: Any = GenerationMixin


def load(
    folder: str | Path,
    *,
    provider: str = "cpu",
    prefill: str = "auto",
    low_memory: bool = False,
    threads: int | None = None,
) -> PopForCausalLM:
    """Load a package for generation with transformers' own `generate`.

    provider: "cpu" or "cuda". prefill: how `generate` encodes prompts: "pop" skips the pruned layers, "full" runs all
    of them, "auto" takes "full" for prompts so short that pruning gains nothing, where that costs nothing (see
    `PopForCausalLM.choose_prefill`). low_memory, threads: see `Runtime`.
    Raises PopcompileError where the package is incomplete, was changed, or the provider cannot run here.
    """
    _require_prefill(prefill)
    main: Stage = "decode" if prefill == "full" else "prefill"
    runtime = Runtime(folder, provider=provider, main=main, low_memory=low_memory, threads=threads)
    if low_memory and runtime.manifest.quantized and runtime.provider.device == "cpu":
        raise PopcompileError(
            f"low_memory: {folder} has {runtime.manifest.dtype} weights, which ONNX Runtime's kernels take packed;"
            " without that a token takes some 30 times as long. Leave it out"
        )
    model = PopForCausalLM(runtime, prefill)
    if model.choose_prefill(1) == "full":
        runtime.open("decode")
    return model


def _require_prefill(prefill: str) -> None:
    if prefill not in PREFILLS:
        raise PopcompileError(f"prefill {prefill}: unknown; choose one of {', '.join(PREFILLS)}")


class PopCache(Cache):
    """What the model remembers of the rows fed so far, for transformers' generation loop.

    It belongs to one model and grows in place, as transformers' DynamicCache does; copy.deepcopy branches it.
    """

    def __init__(self, kv: KVCache) -> None:
        super().__init__(layers=[])
        self.kv = kv
        #: [batch, columns fed] bool, in the caller's layout: which columns are tokens that the cache holds
        self.seen = torch.zeros((len(kv.lengths), 0), dtype=torch.bool)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        return self.seen.shape[1]

    def __len__(self) -> int:
        return len(self.kv.values) // 2

    def __repr__(self) -> str:
        return f"PopCache(lengths={self.kv.lengths})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PopCache:
        other = PopCache(copy.deepcopy(self.kv, memo))
        other.seen = self.seen.clone()
        return other

    @property
    def batch_size(self) -> int:
        return len(self.kv.lengths)

    def hide(self, seen: Tensor) -> None:
        """Forget the columns that a later mask hides: pads that generation put behind a finished row."""
        if bool((seen & ~self.seen).any()):
            raise PopcompileError(
                "attention_mask has a 1 for a column that was padding when it was fed; give the same mask again,"
                " followed by ones for the new tokens"
            )
        for row in (self.seen & ~seen).any(1).nonzero().flatten().tolist():
            kept = seen[row][self.seen[row]]  # of the cached tokens, in their order
            length = int(kept.sum())
            if not bool(kept[:length].all()):
                raise PopcompileError(
                    "attention_mask hides cached tokens before others; the cache can only forget its last ones, start"
                    " again without past_key_values"
                )
            self.kv.lengths[row] = length
        self.seen = seen

    def _refuse(self, *_: object, **__: object) -> Any:
        raise PopcompileError(
            "a PopCache cannot be reordered, cropped or updated; it serves greedy search and sampling"
        )

    update = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse
    activate_past_recording = reset = _refuse


class PopForCausalLM(_GenerationMixin):
    """A causal LM whose `generate` skips the pruned layers while it reads the prompt.

    Called itself it is the full model: `model(input_ids, attention_mask).logits` are those of every token. In
    `generate`, and with `prefill` given, prompts are encoded as `prefill` says.
    """

    main_input_name = "input_ids"
    input_modalities = "text"
    base_model_prefix = ""
    hf_quantizer = None
    _is_stateful = False
    _supports_cache_class = True

    def __init__(self, runtime: Runtime, prefill: str = "auto") -> None:
        self.runtime = runtime
        self.manifest = runtime.manifest
        self.prefill = prefill
        self.config = read_config(runtime.folder, runtime.manifest)
        self.generation_config = read_generation_config(runtime.folder, runtime.manifest, self.config)
        self.device = torch.device("cpu")  # where tokens and logits are, on any provider
        self.dtype = runtime.dtype

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def eval(self) -> PopForCausalLM:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        prefill: str | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Append tokens and return logits.

        input_ids: [B, S] integers. attention_mask: [B, columns fed before + S], 0 for pads, which may be anywhere;
        without it every new column is a token. past_key_values: a cache that this model returned; it grows in place.
        prefill: None runs the full model; "pop", "full" and "auto" as in `load`.
        logits_to_keep: 0 for the logits of every column, [B, S, vocabulary], zeros at pads; 1 for those of each row's
        last token, [B, 1, vocabulary], wherever its pads are. The pruned prefill has the latter only.
        Raises PopcompileError for tokens that are not the model's, rows without any, and too many for its context.
        """
        unknown = [name for name, value in kwargs.items() if value is not None and value is not False]
        if unknown:
            raise PopcompileError(f"{', '.join(unknown)}: not taken by a compiled model; leave it out")
        if prefill is not None:
            _require_prefill(prefill)
        ids = self._require_ids(input_ids)
        cache = self._require_cache(past_key_values, len(ids))
        mask = _columns(ids, attention_mask, cache)
        new = mask[:, cache.get_seq_length() :]
        rows = [row[keep] for row, keep in zip(ids, new, strict=True)]
        self._require_tokens(rows)
        lengths = [int(n) for n in mask.sum(1)]
        self._require_room(max(lengths), 0)
        cache.hide(mask[:, : cache.get_seq_length()])

        pruned = prefill is not None and self.choose_prefill(max(len(r) for r in rows), prefill) == "pop"
        stage: Stage = "prefill" if pruned else "decode"
        every_token = logits_to_keep != 1 and stage == "decode"
        logits = self.runtime.feed(rows, cache.kv, stage, every_token=every_token)
        cache.seen = mask
        if every_token and not bool(new.all()):
            logits = _unpack(logits, new)
        if every_token and logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        output = CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else cache)
        return output if return_dict is not False else output.to_tuple()

    def choose_prefill(self, tokens: int, prefill: str | None = None) -> str:
        """ "pop" or "full": how a prompt of `tokens` new tokens, its longest row's, is encoded.

        For "auto" a short one is bound by reading the weights, and all layers take no longer than fewer, unless they
        have to be read from the session that packs no matrices, or packs them once more: "pop" there.
        """
        prefill = self.prefill if prefill is None else prefill
        _require_prefill(prefill)
        if prefill != "auto":
            return prefill
        free = self.runtime.main == "decode" or not self.runtime.packs
        return "full" if free and tokens < self.manifest.prefill_threshold else "pop"

    # --- generation --------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        prefill: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, greedy or sampled; `prefill` overrides the model's own.

        With past_key_values of an earlier call (return_dict_in_generate=True) and the whole conversation's input_ids,
        only the new tokens are encoded. use_cache=False changes no token; it leaves the cache out of what is returned.
        Raises PopcompileError as `forward` does, and for generation modes that need another cache, beam search among
        them.
        """
        prefill = self.prefill if prefill is None else prefill
        _require_prefill(prefill)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None:
            self._require_ids(ids)
            self._require_continuation(ids, kwargs.get("attention_mask"), kwargs.get("past_key_values"))
        with _one_thread():
            return super().generate(inputs, generation_config, *args, prefill=prefill, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        config._return_cache = config.use_cache is not False
        config.use_cache = True  # without a cache each step would encode its own text as a pruned prompt
        return config, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            mode = generation_mode.value.replace("_", " ")
            raise PopcompileError(f"{mode} is not supported; use greedy search or sampling (num_beams=1)")
        for option in ("prefill_chunk_size", "cache_implementation"):
            if getattr(generation_config, option, None) is not None:
                raise PopcompileError(f"{option} is not supported; leave it out")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        new = generation_config.max_length - input_ids_length
        if new <= 0:
            self._require_room(input_ids_length, 1)
            raise PopcompileError(
                f"the prompt has {input_ids_length} tokens and max_length is {generation_config.max_length}; set"
                " max_new_tokens"
            )
        generation_config._new_tokens = new
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a PopCache where transformers would put its DynamicCache, once prompt and new tokens fit the context."""
        cache = self._require_cache(
            model_kwargs.get("past_key_values"), batch_size * generation_config.num_return_sequences
        )
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            prompt = int(mask.sum(1).max())
        else:  # transformers has dropped a mask of ones
            prompt = max(cache.kv.lengths) + generation_config._mask_length - cache.get_seq_length()
        self._require_room(prompt, generation_config._new_tokens)
        model_kwargs["past_key_values"] = cache

    def _sample(self, input_ids: Tensor, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        output = super()._sample(input_ids, *args, generation_config=generation_config, **kwargs)
        if not generation_config._return_cache and not isinstance(output, Tensor):
            output.past_key_values = None
        return output

    # --- checks ------------------------------------------------------------------------------------------------

    def _require_ids(self, ids: Any) -> Tensor:
        if not isinstance(ids, Tensor):
            raise PopcompileError(
                'input_ids must be a torch tensor [batch, tokens]; tokenize with return_tensors="pt"'
                f" (got {type(ids).__name__})"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise PopcompileError(f"input_ids must be int64 token ids, not {str(ids.dtype).removeprefix('torch.')}")
        if ids.dim() != 2:
            raise PopcompileError(f"input_ids must have the shape [batch, tokens], not {list(ids.shape)}")
        if not ids.numel():
            raise PopcompileError("the prompt is empty; give at least one token")
        return ids.detach().to("cpu", torch.int64)

    def _require_tokens(self, rows: list[Tensor]) -> None:
        for index, row in enumerate(rows):
            if not len(row):
                raise PopcompileError(
                    f"row {index} of input_ids is empty, attention_mask leaves it no new token; give it at least one"
                )
            low, high = (int(t) for t in torch.aminmax(row))
            if low < 0 or high >= self.manifest.vocab_size:
                raise PopcompileError(
                    f"token id {low if low < 0 else high} is not in the vocabulary of {self.manifest.vocab_size};"
                    " use the package's own tokenizer"
                )

    def _require_room(self, tokens: int, new: int) -> None:
        limit = self.manifest.context_length
        if tokens + new > limit:
            text = f"{tokens} tokens" if not new else f"a prompt of {tokens} tokens and {new} new ones"
            raise PopcompileError(f"{text} are more than the model's context of {limit}; shorten the prompt")

    def _require_cache(self, cache: Cache | None, batch: int) -> PopCache:
        if cache is None:
            return PopCache(self.runtime.new_cache(batch))
        if not isinstance(cache, PopCache) or cache.kv.device != self.runtime.provider.device:
            raise PopcompileError(
                f"past_key_values is a {type(cache).__name__} that this model did not make; pass the one that its"
                " generate(return_dict_in_generate=True) or forward returned"
            )
        if cache.batch_size != batch:
            raise PopcompileError(
                f"past_key_values has {cache.batch_size} rows and the input {batch}; use equal batches"
            )
        return cache

    def _require_continuation(self, ids: Tensor, mask: Tensor | None, cache: Cache | None) -> None:
        """transformers finds the new tokens by columns: of the whole conversation, or of the mask."""
        if not isinstance(cache, PopCache):
            return
        columns = max(ids.shape[1], mask.shape[1] if mask is not None else 0)
        if columns <= cache.get_seq_length():
            raise PopcompileError(
                f"past_key_values holds {cache.get_seq_length()} columns and input_ids has {columns}; give the whole"
                " conversation's input_ids, old and new"
            )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch only picks tokens here; its threads, waiting actively, would take the cores from ONNX Runtime."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _columns(ids: Tensor, mask: Tensor | None, cache: PopCache) -> Tensor:
    """Which columns are tokens, [B, columns fed before + S] bool."""
    before = cache.get_seq_length()
    if mask is None:
        return torch.cat((cache.seen, torch.ones(ids.shape, dtype=torch.bool)), dim=1)
    if mask.shape == ids.shape:
        return torch.cat((cache.seen, mask.cpu() != 0), dim=1)
    if mask.shape != (len(ids), before + ids.shape[1]):
        raise PopcompileError(
            f"attention_mask has the shape {list(mask.shape)}; for these input_ids it must be"
            f" {[len(ids), before + ids.shape[1]]}"
        )
    return mask.cpu() != 0


def _unpack(logits: Tensor, new: Tensor) -> Tensor:
    """Logits of packed rows [B, longest, V] at the columns that they came from [B, S, V], zeros at pads."""
    output = logits.new_zeros((*new.shape, logits.shape[2]))
    for row, columns in enumerate(new):
        output[row, columns] = logits[row, : int(columns.sum())]
    return output
