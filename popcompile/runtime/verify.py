"""Check a package: its files, its graphs, and prefill against decode in numbers.

The numeric check needs no second model. Prefill encodes a prompt and runs the boundary token through the whole model;
the same must come out when decode (in the unified layout the same graph) takes one step with the boundary token after
the context tokens' cache that prefill left. A damaged graph, a wrong weight or an operator that a provider computes
differently shows up as a difference. Where the model takes images, the prompt has one of noise in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.export.precisions import PRECISIONS
from popcompile.package.configs import load_tokenizer, read_config, read_generation_config
from popcompile.package.graph_check import read_graphs
from popcompile.package.integrity import check_files
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.runtime.embeddings import RowImages
from popcompile.runtime.image_check import check_images, image_sizes
from popcompile.runtime.noise import make_pixels, make_prompt
from popcompile.runtime.session import Runtime, Stage

_PROMPT = 33
#: prompts of which one has to agree: where activations are rounded to integers, the last bit of a sum may tip one to
#: the next integer and change all that follows, but not in every prompt, as a wrong graph does
_TRIES = 3


def verify(folder: Path, *, provider: str = "cpu") -> list[dict[str, Any]]:
    """Run all checks; returns [{"check", "detail"}] of those that passed, which is all of them.

    Raises PopcompileError at the first that fails.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, full=True)
    size = sum(f["size"] for f in manifest.files.values()) / 1e6
    checks = [{"check": "files", "detail": f"{len(manifest.files)} files, {size:.0f} MB, SHA-256 as in the manifest"}]
    checks.append({"check": "graphs", "detail": _check_graphs(folder, manifest)})
    checks.append({"check": "configs", "detail": _check_configs(folder, manifest)})
    runtime = _open(folder, manifest, provider)
    if manifest.images is not None:
        checks.append({"check": "images", "detail": f"{check_images(runtime)} ({provider})"})
    difference = _self_check(folder, runtime, provider)
    detail = (
        f"prefill equals decode, in one step and in several; largest relative difference {difference:.1e} ({provider})"
    )
    checks.append({"check": "numbers", "detail": detail})
    return checks


def _check_graphs(folder: Path, manifest: Manifest) -> str:
    """Operators, places of the weights, inputs and outputs: see graph_check.py."""
    read_graphs(folder, manifest)
    return f"{', '.join(manifest.graphs.values())}: {manifest.num_layers} layers, inputs and outputs as in the manifest"


def _check_configs(folder: Path, manifest: Manifest) -> str:
    """What transformers makes of the configs and of the tokenizer, where there is one: as loading does."""
    config = read_config(folder, manifest)
    read_generation_config(folder, manifest, config)
    if not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in manifest.files):
        return f"{config.model_type}, no tokenizer"
    return f"{config.model_type}, {type(load_tokenizer(folder, manifest)).__name__}"


def _open(folder: Path, manifest: Manifest, provider: str) -> Runtime:
    """Nothing is packed: packed kernels for quantized weights round otherwise for one token than for several."""
    runtime = Runtime(folder, provider=provider, low_memory=True)
    if runtime.manifest != manifest:
        raise PopcompileError(f"{folder}: was replaced while it was checked; verify it again")
    return runtime


def _self_check(folder: Path, runtime: Runtime, provider: str) -> float:
    """Largest relative difference between the two ways to encode the tokens of the window."""
    manifest = runtime.manifest
    allowed = PRECISIONS[manifest.dtype].tolerance
    for seed in range(_TRIES if manifest.quantized else 1):
        worst = _difference(folder, runtime, provider, seed)
        if worst <= allowed:
            return worst
    raise PopcompileError(
        f"{folder}: prefill and decode disagree on {provider} by {worst:.1e} of the largest value (allowed:"
        f" {allowed:.0e}); convert again, or report it"
    )


@dataclass(frozen=True)
class _Prompt:
    """ids [1, S]; images: among them, of the one row; text: how many tokens stand behind the last of these."""

    ids: Tensor
    images: list[RowImages] | None
    text: int

    @classmethod
    def random(cls, runtime: Runtime, seed: int) -> _Prompt:
        """Longer than the window, as far as the context allows, with an image where the model takes them."""
        manifest, inputs = runtime.manifest, runtime.manifest.images
        length = min(_PROMPT + manifest.window, manifest.context_length)
        ids = torch.randint(0, manifest.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
        if inputs is None:
            return cls(ids[None], None, length)
        size = image_sizes(inputs)[0]
        tokens = size[0] * size[1]
        ids, places = make_prompt(inputs, ids[: manifest.context_length - tokens], [size])
        images = RowImages(runtime.encode_images(*make_pixels(runtime, [size], seed)), places)
        return cls(ids[None], [images], len(ids) - places[0].begin - tokens)


def _difference(folder: Path, runtime: Runtime, provider: str, seed: int) -> float:
    """Largest relative difference on one random prompt."""
    manifest, prompt = runtime.manifest, _Prompt.random(runtime, seed)
    ids, length = prompt.ids, prompt.ids.shape[1]
    prefilled, stepped = runtime.new_cache(1), runtime.new_cache(1)
    logits = runtime.feed([ids[0]], prefilled, "prefill", images=prompt.images)
    runtime.feed([ids[0]], stepped, "prefill", images=prompt.images)
    stage: Stage = "decode" if "decode" in manifest.graphs else "prefill"
    again = min(manifest.window, prompt.text) if stage == "decode" else 1  # more is a prompt for the other graph
    expected = runtime.run(stage, ids[:, -again:], [length], stepped)[:, -1:]  # anew, over their own slots
    if logits.min() == logits.max():
        raise PopcompileError(f"{folder}: its graphs compute nothing on {provider}: all logits are equal; report it")
    pairs = [(logits, expected), *zip(prefilled.tensors(), stepped.tensors(), strict=True)]
    if stage == "decode":  # as the full model: a prompt at once, and its last token after the others
        at_once, last = runtime.new_cache(1), runtime.new_cache(1)
        runtime.run(stage, ids[:, :-1], [length - 1], last, prompt.images)
        whole = runtime.run(stage, ids, [length], at_once, prompt.images)[:, -1:]
        pairs.append((whole, runtime.run(stage, ids[:, -1:], [length], last)))
        pairs += zip(at_once.tensors(), last.tensors(), strict=True)
    worst = 0.0
    for one, other in pairs:
        one, other = one.float(), other.float()
        if not torch.isfinite(one).all() or not torch.isfinite(other).all():
            raise PopcompileError(f"{folder}: the graphs compute NaN or infinity on {provider}; try --dtype fp32")
        worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1e-6)))
    return worst
