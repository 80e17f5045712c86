"""Private names of other libraries are in popcompile/upstream.py alone, and each of them exists."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationMixin

from popcompile import upstream
from popcompile.runtime.generation import PopForCausalLM

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("popcompile", "passes", "export") for path in (ROOT / folder).rglob("*.py"))
#: modules of transformers that are private but for their names
INTERNAL = {"transformers.core_model_loading", "transformers.conversion_mapping"}
OTHERS = ("torch", "transformers", "huggingface_hub", "onnxscript", "onnx", "onnx_ir", "onnxruntime", "peft", "numpy")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """What this project defines: functions, classes, and attributes that it assigns."""
    found = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def borrowed(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of others that a module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OTHERS:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(map(private, parts)) or node.module in INTERNAL:
                yield f"line {node.lineno}: from {node.module} import {parts[-1]}"
        elif isinstance(node, ast.Import):
            yield from (
                f"line {node.lineno}: import {a.name}" for a in node.names if any(map(private, a.name.split(".")))
            )
        elif isinstance(node, ast.Attribute) and private(node.attr):
            operator = isinstance(node.value, ast.Name) and node.value.id == "aten"  # aten._to_copy is its public name
            if not operator and node.attr not in own | set(upstream.OVERRIDDEN):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(str(name.value)) and name.value not in own:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_one_module_uses_private_names() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES if path.name != "upstream.py"}
    own = own_names(list(trees.values()))
    found = [f"{path.relative_to(ROOT)}, {use}" for path, tree in trees.items() for use in borrowed(tree, own)]
    assert not found, "put these into popcompile/upstream.py"


def test_the_search_finds_them() -> None:
    code = (
        "from torch._ops import OpOverload\nimport torch.utils._pytree\nfrom transformers.conversion_mapping import x\n"
        "parameter._is_hf_initialized\ngetattr(array, '_mmap', None)\nself._own\naten._to_copy\n"
    )
    assert len(list(borrowed(ast.parse(code), {"_own"}))) == 5


@pytest.mark.parametrize("entry", upstream.NAMES, ids=lambda entry: entry.where)
def test_name_exists(entry: upstream.Private) -> None:
    module, _, path = entry.where.partition(":")
    assert entry.purpose and entry.since
    if entry.where.endswith("_is_hf_initialized"):  # an attribute that transformers looks for, nowhere declared
        assert "_is_hf_initialized" in inspect.getsource(importlib.import_module("transformers.initialization"))
        return
    if entry.where.endswith("_mask_length"):
        return  # set while generate runs; test_generation.py goes through it
    value = importlib.import_module(module)
    for name in path.split("."):
        if isinstance(value, type) and not hasattr(value, name):  # set in __init__
            made = {"Module": torch.nn.Linear(1, 1), "OpOverload": torch.ops.aten.add.Tensor}
            value = made.get(value.__name__) or np.memmap(__file__, mode="r")
        value = getattr(value, name)
    last = path.rpartition(".")[2]
    source = (ROOT / "popcompile" / "upstream.py").read_text()
    assert source.count(last) > 1, f"{last} is listed and not used"


@pytest.mark.parametrize("method", upstream.OVERRIDDEN)
def test_overridden_method_is_as_expected(method: str) -> None:
    assert method in vars(PopForCausalLM), "no longer overridden: take it off the list"
    found = tuple(inspect.signature(getattr(GenerationMixin, method)).parameters)
    assert found == upstream.OVERRIDDEN[method], f"transformers {transformers.__version__} changed {method}"


def test_every_overridden_private_method_is_listed() -> None:
    ours = {name for name in vars(PopForCausalLM) if private(name) and hasattr(GenerationMixin, name)}
    assert ours == set(upstream.OVERRIDDEN)
