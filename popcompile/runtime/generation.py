"""A package as a transformers model: PopForCausalLM generates like any causal LM, and its prompts are encoded pruned.

transformers pads batches on the left, and its attention mask covers everything fed so far, pads included. Here every
row is packed to the left without its pads; PopCache remembers which of the caller's columns were tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from popcompile.errors import PopcompileError
from popcompile.package.configs import read_config, read_generation_config
from popcompile.runtime.embeddings import RowImages
from popcompile.runtime.generation_arguments import (
    ARGUMENTS,
    FIELDS,
    refuse_batching,
    refuse_hub_code,
    require_function,
    require_supported,
    unknown_arguments,
)
from popcompile.runtime.generation_cache import PopCache, PopOutput, generated
from popcompile.runtime.session import Runtime, Stage
from popcompile.upstream import CACHE, OTHER_CACHE, mask_length, register_for_pipelines

PREFILLS = ("auto", "pop", "full")

#: transformers types its mixin for PreTrainedModel, which this module's is not
_GenerationMixin: Any = GenerationMixin
#: of generate, in their order
_ARGUMENTS = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
register_for_pipelines("PopForCausalLM")


def load(
    folder: str | Path,
    *,
    provider: str = "cpu",
    prefill: str = "auto",
    low_memory: bool = False,
    threads: int | None = None,
) -> PopForCausalLM:
    """Load a package for generation with transformers' own `generate`; of images too, where the model takes them.

    provider: "cpu" or "cuda". prefill: how `generate` encodes prompts: "pop", the default, skips the pruned layers but
    for a prompt's last tokens, the package's window; "full" runs all of them; "auto" is "pop". low_memory, threads: see
    `Runtime`.
    Raises PopcompileError where the package is incomplete, was changed, or the provider cannot run here.
    """
    _require_prefill(prefill)
    main: Stage = "decode" if prefill == "full" else "prefill"
    runtime = Runtime(folder, provider=provider, main=main, low_memory=low_memory, threads=threads)
    if low_memory and runtime.manifest.quantized and runtime.provider.on_host:
        raise PopcompileError(
            f"low_memory: {folder} has {runtime.manifest.dtype} weights, which ONNX Runtime's kernels take packed;"
            " without that a token takes some 30 times as long. Leave it out"
        )
    if runtime.manifest.images is not None:
        from popcompile.runtime.image_text import PopForImageTextToText  # it builds on this module

        return PopForImageTextToText(runtime, prefill)
    return PopForCausalLM(runtime, prefill)


def _require_prefill(prefill: str) -> None:
    if prefill not in PREFILLS:
        raise PopcompileError(f"prefill {prefill}: unknown; choose one of {', '.join(PREFILLS)}")


class PopForCausalLM(_GenerationMixin):
    """A causal LM whose `generate` skips the pruned layers while it reads the prompt.

    Called itself it is the full model: `model(input_ids, attention_mask).logits` are those of every token. In
    `generate`, and with `prefill` given, prompts are encoded as `prefill` says.
    """

    main_input_name = "input_ids"
    input_modalities: str | tuple[str, ...] = "text"
    base_model_prefix = ""
    hf_quantizer = None
    #: what `forward` takes of images
    image_arguments: tuple[str, ...] = ()
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

    def __repr__(self) -> str:
        made, window = self.manifest, f", window {self.manifest.window}" if self.manifest.window > 1 else ""
        skipped = f"{len(made.pruned)} of {made.num_layers} layers skipped in prefill{window}"
        return (
            f"{type(self).__name__}({str(self.runtime.folder)!r}, {made.model_type}: {skipped}; {made.dtype} on"
            f" {self.runtime.provider.device}, prefill {self.prefill!r})"
        )

    def close(self) -> None:
        """End the sessions and let go of the weights; also at the end of `with popcompile.load(...) as model:`."""
        self.runtime.close()

    def __enter__(self) -> PopForCausalLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> PopOutput | tuple[Any, ...]:
        """Append tokens and return logits.

        input_ids: [B, S] integers. attention_mask: [B, columns fed before + S], 0 for pads, which may be anywhere;
        without it every new column is a token. past_key_values, or cache as transformers calls it since 5.24: one that
        this model returned; it grows in place.
        prefill: None runs the full model; "pop", "full" and "auto" as in `load`.
        logits_to_keep: 0 for the logits of every column, [B, S, vocabulary], zeros at pads; 1 for those of each row's
        last token, [B, 1, vocabulary], wherever its pads are. The pruned prefill has the latter only.
        Raises PopcompileError for tokens that are not the model's, rows without any, and too many for its context.
        """
        self._require_known(kwargs)
        if prefill is not None:
            _require_prefill(prefill)
        ids = self._require_ids(input_ids)
        held = self._require_cache(_either(past_key_values, cache), len(ids))
        mask = _columns(ids, attention_mask, held)
        new = mask[:, held.get_seq_length() :]
        rows = [row[keep] for row, keep in zip(ids, new, strict=True)]
        self._require_tokens(rows)
        lengths = [int(n) for n in mask.sum(1)]
        self._require_room(max(lengths), 0)
        held.hide(mask[:, : held.get_seq_length()])

        pruned = prefill is not None and self.choose_prefill(prefill) == "pop"
        stage: Stage = "prefill" if pruned else "decode"
        every_token = logits_to_keep != 1 and stage == "decode"
        images = self._images_of(rows, held, kwargs)
        before = list(held.kv.lengths)
        logits = self.runtime.feed(rows, held.kv, stage, every_token=every_token, images=images)
        held.seen = mask
        if images is not None:
            held.note_images(images, before)
        if every_token and not bool(new.all()):
            logits = _unpack(logits, new)
        if every_token and logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        kept: dict[str, Any] = {CACHE: None if use_cache is False else held}
        output = PopOutput(logits=logits, **kept)
        return output if return_dict is not False else output.to_tuple()

    def _images_of(self, rows: list[Tensor], cache: PopCache, given: dict[str, Any]) -> Sequence[RowImages] | None:
        """The images among the new tokens of every row. given: of `image_arguments`."""
        return None

    def choose_prefill(self, prefill: str | None = None) -> str:
        """ "pop" or "full": how prompts are encoded. "auto" is "pop", which encodes short ones in full as well."""
        prefill = self.prefill if prefill is None else prefill
        _require_prefill(prefill)
        return "full" if prefill == "full" else "pop"

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

        With past_key_values (or cache) of an earlier call (return_dict_in_generate=True) and the whole conversation's
        input_ids, only the new tokens are encoded. use_cache=False changes no token; it leaves the cache out of what is
        returned.
        Raises PopcompileError as `forward` does, and by their names for arguments that need another cache or other
        outputs than logits, beam search's among them (generation_arguments.py).
        """
        prefill = self.prefill if prefill is None else prefill
        _require_prefill(prefill)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        cache = _either(kwargs.pop(OTHER_CACHE, None), kwargs.pop(CACHE, None))
        if cache is not None:
            kwargs[CACHE] = cache
        given = dict(zip(_ARGUMENTS, (inputs, generation_config, *args), strict=False)) | kwargs
        require_supported(given, ARGUMENTS | FIELDS)
        require_function(given.get("custom_generate"))
        if ids is not None:
            self._require_ids(ids)
            self._require_continuation(ids, kwargs.get("attention_mask"), cache)
        with _one_thread():
            return super().generate(inputs, generation_config, *args, prefill=prefill, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        require_supported(vars(config), FIELDS)
        config._return_cache = config.use_cache is not False
        config.use_cache = True  # without a cache each step would encode its own text as a pruned prompt
        return config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What of the caller's arguments is left for `forward`."""
        self._require_known(model_kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        unknown = unknown_arguments(inputs, self.forward, self.image_arguments)
        if unknown:  # the caller's own were checked before
            raise PopcompileError(
                f"generate of transformers {transformers.__version__} passes {', '.join(unknown)}, which is newer than"
                " this popcompile; install the versions that were tested: pip install --upgrade popcompile"
            )
        return inputs

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):  # one that FIELDS has not
            mode = generation_mode.value.replace("_", " ")
            raise PopcompileError(f"{mode} is not supported; use greedy search or sampling (num_beams=1)")
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
        cache = self._require_cache(model_kwargs.get(CACHE), batch_size * generation_config.num_return_sequences)
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            prompt = int(mask.sum(1).max())
        else:  # transformers has dropped a mask of ones
            columns = mask_length(generation_config) or cache.get_seq_length()
            prompt = max(cache.kv.lengths) + columns - cache.get_seq_length()
        self._require_room(prompt, generation_config._new_tokens)
        model_kwargs[CACHE] = cache

    def _sample(self, input_ids: Tensor, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        kwargs.pop("tokenizer", None)  # of stop_strings and token_healing; the loop would hand it to forward
        output = super()._sample(input_ids, *args, generation_config=generation_config, **kwargs)
        return generated(output, generation_config._return_cache)

    load_custom_generate = refuse_hub_code
    generate_batch = init_continuous_batching = continuous_batching_context_manager = refuse_batching

    # --- checks ------------------------------------------------------------------------------------------------

    def _require_known(self, arguments: dict[str, Any]) -> None:
        unknown = unknown_arguments(arguments, self.forward, self.image_arguments)
        if unknown:
            pixels = "; the package's model takes no images" if "pixel_values" in unknown else ""
            raise PopcompileError(f"{', '.join(unknown)}: not taken by a compiled model; leave it out{pixels}")

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


def _either(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that was given, under whichever of its names."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise PopcompileError("past_key_values and cache are two names of one argument; give one of them")
    return cache if past_key_values is None else past_key_values


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
