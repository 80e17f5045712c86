"""One case: a tiny model's package beside transformers' own module, or the line that refuses the model."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path

import torch
from conftest import tiny_model
from families import pop_by_hooks
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

import popcompile
from popcompile.errors import PopcompileError
from popcompile.frontend.source import open_source
from popcompile.loading import one_line, quiet

from .configs import default_config, tiny_config
from .worker import Case

#: of the largest logit of transformers' module
TOLERANCE = 1e-4
#: of three layers
PRUNED, WINDOW = [1], 5
#: of a tiny model; more is a field that was not made small
PARAMETERS = 5_000_000

torch.set_num_threads(1)


def result_of(case: Case, folder: Path) -> tuple[str, str, str]:
    """Outcome, detail and where it was found out; see `Result`."""
    try:
        config = tiny_config(case.model_type, case.changes)
    except Exception as error:
        if case.changes:
            return "no reference", f"config: {one_line(error)}", "config"
        config = default_config(case.model_type)  # fields that belong together in a way that the table does not know
    config.save_pretrained(folder / "config")
    try:
        open_source(str(folder / "config"), random_weights=True)
    except PopcompileError as error:
        return "refused", _line(error, folder), "config"
    except Exception:
        return "internal error", _last_call(), "config"
    expected: dict[str, Tensor] | str
    try:
        with quiet():
            model = _model(config)
            model.save_pretrained(folder / "model")
            expected = _expected(model)
    except Exception as error:
        expected = one_line(error)
    try:
        if isinstance(expected, str):  # then it has to be refused
            popcompile.convert(folder / "config", folder / "out", layers=str(PRUNED[0]), random_weights=True)
            return "no reference", f"module: {expected}", "conversion"
        layers = ",".join(map(str, PRUNED))
        popcompile.convert(folder / "model", folder / "out", layers=layers, kv_projection="layer", window=WINDOW)
        got = _got(folder / "out")
    except PopcompileError as error:
        return "refused", _line(error, folder), "conversion"
    except Exception:
        return "internal error", _last_call(), "conversion"
    errors = {name: _difference(got[name], expected[name]) for name in expected}
    text = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    return ("works" if all(error <= TOLERANCE for error in errors.values()) else "wrong"), text, "conversion"


def _line(error: Exception, folder: Path) -> str:
    return str(error).replace(str(folder / "model"), "MODEL").replace(str(folder / "config"), "MODEL")


def _last_call() -> str:
    lines = traceback.format_exc().strip().splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    return " ".join(f"{lines[-1]} ({places[-1]})".split())


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    if count > PARAMETERS:
        raise ValueError(f"{count} parameters")
    return tiny_model(config)


def _ids() -> Tensor:
    """[1, 40]."""
    return torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))


def _batch() -> tuple[Tensor, Tensor]:
    """Two prompts of 14 and 9 tokens, padded on the left, and their mask."""
    ids = _ids()
    rows = torch.cat([ids[:, :14], torch.nn.functional.pad(ids[:, 14:23], (5, 0))])
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    return rows, mask


@torch.no_grad()
def _expected(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits of transformers' module: of a prompt, of a second one after it, of a padded batch, and pruned."""
    ids, cache = _ids(), DynamicCache()
    full = model(ids[:, :20], past_key_values=cache, use_cache=True).logits
    second = model(ids[:, 20:32], past_key_values=cache, use_cache=True).logits
    rows, mask = _batch()
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    batch = model(rows, attention_mask=mask, use_cache=False, **positions).logits
    pruned, _ = pop_by_hooks(model, ids[:, :20], PRUNED, window=WINDOW)
    return {"full": full, "second": second, "batch": batch[mask.bool()], "pruned": pruned}


def _got(folder: Path) -> dict[str, Tensor]:
    """The same of a package."""
    model = popcompile.load(folder, prefill="pop", threads=1)
    ids = _ids()
    first = model(ids[:, :20])
    second = model(ids[:, 20:32], past_key_values=first.past_key_values)
    rows, mask = _batch()
    batch = model(rows, attention_mask=mask)
    pruned = model(ids[:, :20], prefill="pop")
    return {"full": first.logits, "second": second.logits, "batch": batch.logits[mask.bool()], "pruned": pruned.logits}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not bool(theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())
