"""A process that takes cases one after another: converts a tiny model and compares it with transformers' own module."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing import get_context
from pathlib import Path
from typing import Any

#: of the largest logit of transformers' module
TOLERANCE = 1e-4
PRUNED = [1]
#: bytes that a case may take
MEMORY = 4 << 30
#: of a tiny model; more is a field that was not made small
PARAMETERS = 5_000_000


@dataclass(frozen=True)
class Case:
    """A model type with changes of its tiny config. variant: a name for these."""

    model_type: str
    variant: str
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model_type}: {self.variant}"


@dataclass(frozen=True)
class Result:
    """outcome: "works", "refused", "wrong", "internal error", "no reference", "hang" or "crash"; detail: the errors of the
    four comparisons, or the line.
    """

    outcome: str
    detail: str
    seconds: float


def serve(connection: Connection, folder: str) -> None:
    """Answer cases until the other end is closed."""
    import torch

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            outcome, detail = _outcome(case, Path(place))
        connection.send(Result(outcome, detail, round(time.monotonic() - started, 1)))


class Worker:
    """The process, started when it is needed and again after a crash or a case that takes too long."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._folder = tempfile.mkdtemp(prefix="popcompile-sweep-")
        self._context = get_context("spawn")
        self._process: Any = None

    def run(self, case: Case) -> Result:
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=serve, args=(theirs, self._folder), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(case)
            if self._connection.poll(self._limit):
                return self._connection.recv()
            outcome = Result("hang", f"no answer in {self._limit:.0f} s", self._limit)
        except (EOFError, OSError):
            self._process.join(5)
            outcome = Result("crash", f"the process ended with {self._process.exitcode}", 0)
        self.stop()
        return outcome

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _outcome(case: Case, folder: Path) -> tuple[str, str]:
    import popcompile
    from popcompile.errors import PopcompileError
    from popcompile.loading import one_line, quiet
    from popcompile.source import open_source

    from .configs import tiny_config

    try:
        config = tiny_config(case.model_type, case.changes)
    except Exception as error:
        return "no reference", f"config: {one_line(error)}"
    (folder / "config").mkdir()
    config.save_pretrained(folder / "config")
    try:
        open_source(str(folder / "config"), random_weights=True)
    except PopcompileError as error:
        return "refused", f"config: {_without(error, folder)}"
    except Exception:
        return "internal error", _last_line()
    try:
        with quiet():
            model = _model(config)
            model.save_pretrained(folder / "model")
        expected = _expected(model)
    except Exception as error:
        expected = one_line(error)
    try:
        popcompile.convert(folder / "model" if not isinstance(expected, str) else folder / "config", folder / "out",
                           layers=",".join(map(str, PRUNED)), kv_projection="layer", random_weights=isinstance(expected, str))
        if isinstance(expected, str):
            return "no reference", f"module: {expected}"
        got = _got(folder / "out")
    except PopcompileError as error:
        return "refused", f"convert: {_without(error, folder)}"
    except Exception:
        return "internal error", _last_line()
    errors = {k: _difference(got[k], expected[k]) for k in expected}
    text = ", ".join(f"{k} {e:.0e}" for k, e in errors.items())
    return ("works" if all(e <= TOLERANCE for e in errors.values()) else "wrong"), text


def _without(error: Exception, folder: Path) -> str:
    text = str(error)
    for name in ("model", "config"):
        text = text.replace(str(folder / name), "MODEL")
    return text


def _last_line() -> str:
    lines = traceback.format_exc().strip().splitlines()
    where = [line.strip() for line in lines if line.strip().startswith("File ")]
    return " ".join(f"{lines[-1]} ({where[-1] if where else ''})".split())[:600]


def _model(config: Any) -> Any:
    import torch
    from conftest import tiny_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    if count > PARAMETERS:
        raise ValueError(f"{count} parameters")
    return tiny_model(config)


def _ids(length: int = 40) -> Any:
    import torch

    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(0))


#: a batch of two prompts, one padded on the left
_LONG, _SHORT = 14, 9


def _batch() -> tuple[Any, Any]:
    import torch

    ids = _ids()
    rows = torch.cat([ids[:, :_LONG], torch.nn.functional.pad(ids[:, _LONG : _LONG + _SHORT], (_LONG - _SHORT, 0))])
    mask = torch.ones_like(rows)
    mask[1, : _LONG - _SHORT] = 0
    return rows, mask


def _expected(model: Any) -> dict[str, Any]:
    """What transformers' module gives: logits [.., vocabulary] by case."""
    import inspect

    import torch
    from families import pop_by_hooks
    from transformers import DynamicCache

    with torch.no_grad():
        ids, cache = _ids(), DynamicCache()
        full = model(ids[:, :20], past_key_values=cache, use_cache=True).logits
        second = model(ids[:, 20:32], past_key_values=cache, use_cache=True).logits
        rows, mask = _batch()
        positions = {}
        if "position_ids" in inspect.signature(model.forward).parameters:
            positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        batch = model(rows, attention_mask=mask, use_cache=False, **positions).logits
        pruned, _ = pop_by_hooks(model, ids[:, :20], PRUNED)
    return {"full": full, "second": second, "batch": batch[mask.bool()], "pruned": pruned}


def _got(folder: Path) -> dict[str, Any]:
    import popcompile

    model = popcompile.load(folder, prefill="pop", threads=1)
    ids = _ids()
    first = model(ids[:, :20])
    second = model(ids[:, 20:32], past_key_values=first.past_key_values)
    rows, mask = _batch()
    batch = model(rows, attention_mask=mask)
    pruned = model(ids[:, :20], prefill="pop")
    return {"full": first.logits, "second": second.logits, "batch": batch.logits[mask.bool()], "pruned": pruned.logits}


def _difference(ours: Any, theirs: Any) -> float:
    if ours.shape != theirs.shape or not bool(theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())
