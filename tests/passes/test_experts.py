"""Mixtures of experts: their operator, their checkpoints, and what ONNX Runtime computes of them.

test_families.py has whole models beside transformers' own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from bad_input import change_tensor, refusal
from conftest import tiny_model, tiny_moe
from safetensors.torch import load_file, save_file
from test_quantization import quantized, rounded
from torch import Tensor
from transformers import AutoConfig, MixtralConfig, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import popcompile
from popcompile.export.providers import PROVIDERS
from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import open_source
from popcompile.frontend.tracing import trace
from popcompile.passes import ExpertKernels, PassManager, Quantization, lowering, ops, transformations
from popcompile.passes.flops import flops_by_layer
from popcompile.passes.graph import call_nodes, find
from popcompile.passes.onnx_ops import onnx_op_type

aten = torch.ops.aten
EXPERTS, CHOSEN, HIDDEN, INNER = 4, 2, 32, 48  # of tiny_moe
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def ids(length: int = 20) -> Tensor:
    return torch.randint(64, (1, length), generator=torch.Generator().manual_seed(0))


def kinds(graph: Path) -> Counter[str]:
    """How many nodes of each operator an ONNX graph has, for a single token."""
    nodes = onnx_ir.load(graph).graph
    branch = nodes[-1].attributes.get("then_branch")
    return Counter(node.op_type for node in (branch.as_graph() if branch else nodes))


# --- the operator ----------------------------------------------------------------------------------------------


def test_operator() -> None:
    """As transformers' module, gradients too: of the tokens, of the weights of the choice, and of the experts."""
    torch.manual_seed(0)
    config = tiny_moe()
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).double()  # the order of sums then matters to no CPU
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    x, scores = (torch.randn(9, n, dtype=torch.float64, requires_grad=True) for n in (HIDDEN, EXPERTS))
    weights, index = scores.softmax(-1).topk(CHOSEN)
    inputs = (x, scores, *module.parameters())
    ours = ops.REFERENCE[ops.experts](x, module.gate_up_proj, module.down_proj, index, weights)
    theirs = module(x, index, weights)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_experts_of_another_activation_are_refused() -> None:
    message = refusal(lambda: trace(tiny_moe(hidden_act="gelu")))
    assert "Qwen3MoeExperts has other experts than popcompile supports: SwiGLU blocks" in message


def test_flops_are_those_of_the_chosen_experts() -> None:
    """Of one layer with and one without, decoding one token: the same but for the feed-forward block."""
    program = trace(tiny_moe(mlp_only_layers=[0], intermediate_size=64))
    PassManager(transformations([])).run(program)
    canonical = flops_by_layer(program.graphs["decode"], "decode")
    router, experts, dense = 2 * HIDDEN * EXPERTS, CHOSEN * 2 * 3 * HIDDEN * INNER, 2 * 3 * HIDDEN * 64
    assert canonical[1] - canonical[0] == router + experts - dense
    PassManager(lowering()).run(program)
    assert flops_by_layer(program.graphs["decode"], "decode") == canonical


# --- checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(tiny_moe())


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    """As transformers saves it: a tensor for each matrix of each expert."""
    model.save_pretrained(tmp_path / "model")
    assert UP in load_file(tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def checkpoint(folder: Path) -> Checkpoint:
    source = open_source(str(folder))
    return Checkpoint(source, trace(source.config), torch.float32)


def test_experts_are_merged(model: PreTrainedModel, folder: Path) -> None:
    read = checkpoint(folder).read
    for name, parameter in model.named_parameters():
        assert torch.equal(read(name), parameter), name


def test_experts_that_are_merged_already(model: PreTrainedModel, folder: Path) -> None:
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    assert UP not in load_file(folder / "model.safetensors")
    read = checkpoint(folder).read
    for name, parameter in model.named_parameters():
        assert torch.equal(read(name), parameter), name


def test_a_checkpoint_of_the_base_model(model: PreTrainedModel, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(checkpoint(folder).read(name), model.get_parameter(name))


def test_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Expert 2 comes before expert 10, also under names that transformers changes as well."""
    model = tiny_model(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=12,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    assert any(".block_sparse_moe.experts.11.w3." in name for name in load_file(tmp_path / "model.safetensors"))
    for matrix in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{matrix}"
        assert torch.equal(checkpoint(tmp_path).read(name), model.get_parameter(name))


DAMAGE: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "missing": (lambda t: None, f"has no tensor {UP}; its config describes another model"),
    "shape": (
        lambda t: t[:, 1:].clone(),
        r"tensors model.layers.1.mlp.experts.0.gate_proj.weight to model.layers.1.mlp.experts.3.up_proj.weight have "
        r"shapes \[48, 31\] and \[48, 32\], its config asks for \[4, 96, 32\]; config and weights belong to different",
    ),
    "integers": (lambda t: t.to(torch.int8), f"tensor {UP} holds int8; give an unquantized checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_expert(damage: str, folder: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    change_tensor(folder, UP, change)
    assert re.search(message, refusal(lambda: popcompile.convert(folder, tmp_path / "out", kv_projection="layer")))
    assert not (tmp_path / "out").exists()


def test_experts_of_another_size(folder: Path) -> None:
    """All of them alike, but not as the config says."""
    config = AutoConfig.from_pretrained(folder)
    config.moe_intermediate_size = 40
    config.save_pretrained(folder)
    assert "have shapes [48, 32], its config asks for [4, 80, 32]" in refusal(lambda: checkpoint(folder))


def test_no_experts_at_all(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if ".experts." not in name}, folder / "model.safetensors")
    assert "has no tensor model.layers.0.mlp.experts.gate_up_proj;" in refusal(lambda: checkpoint(folder))


# --- packages --------------------------------------------------------------------------------------------------


def test_random_weights(folder: Path, tmp_path: Path) -> None:
    manifest = popcompile.convert(folder, tmp_path / "out", random_weights=True)
    assert manifest.pruned == [1]
    assert torch.isfinite(popcompile.load(tmp_path / "out")(ids()).logits).all()


def test_fp16(tmp_path: Path) -> None:
    """Every expert is chosen: rounding would choose another where two are nearly as good."""
    model = tiny_model(tiny_moe(num_experts_per_tok=EXPERTS))
    model.save_pretrained(tmp_path / "model")
    popcompile.convert(tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", dtype="fp16")
    logits = popcompile.load(tmp_path / "out")(ids()).logits
    with torch.no_grad():
        expected = model(ids()).logits
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0)  # logits are up to 10
    assert kinds(tmp_path / "out" / "decode.onnx")["MoE"] == 2


def rounded_experts(model: PreTrainedModel, bits: int, block_size: int) -> PreTrainedModel:
    """transformers' model with rounded weights in its linear layers and experts; the routers are no nn.Linear."""
    result = quantized(model, bits, block_size)
    for module in result.modules():
        if isinstance(module, Qwen3MoeExperts):
            for matrices in module.parameters():
                matrices.data = torch.stack([rounded(matrix, bits, block_size) for matrix in matrices.detach()])
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [("int4", 2e-3), ("int8", 0.2)])
def test_quantized(dtype: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of experts of 8 bits multiplies in int8, whatever it is told; every expert is chosen, as above."""
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], accuracy_level=0))
    model = tiny_model(tiny_moe(num_experts_per_tok=EXPERTS))
    model.save_pretrained(tmp_path / "model")
    popcompile.convert(
        tmp_path / "model", tmp_path / "out", layers="1", kv_projection="layer", dtype=dtype, block_size=16
    )
    expected = rounded_experts(model, int(dtype[3:]), 16)
    with torch.no_grad():
        logits = popcompile.load(tmp_path / "out")(ids()).logits
        torch.testing.assert_close(logits, expected(ids()).logits, atol=tolerance, rtol=0)  # logits are up to 10
        without = quantized(model, int(dtype[3:]), 16)(ids()).logits
    assert dtype == "int8" or (logits - without).abs().max() > 100 * tolerance
    found = kinds(tmp_path / "out" / "decode.onnx")
    assert (found["QMoE"], found["MoE"], found["MatMul"]) == (2, 0, 2)  # the routers are not quantized


CPU, CUDA = (ExpertKernels(**PROVIDERS[name].experts) for name in ("cpu", "cuda"))


def lowered(dtype: torch.dtype, kernels: ExpertKernels, quantization: Quantization | None = None) -> Counter[Any]:
    """How many nodes of each operator the lowered decode graph has."""
    program = trace(tiny_moe(), dtype)
    PassManager([*transformations([]), *lowering(quantization, kernels)]).run(program)
    graph = program.graphs["decode"]
    assert not find(graph, op=ops.experts)
    return Counter(onnx_op_type(n) or n.target for n in call_nodes(graph))


def test_what_a_provider_cannot_quantize_stays_as_it_is() -> None:
    whole, partial = Quantization(4, 16), Quantization(4, 32)  # 48 is one and a half blocks of 32
    assert lowered(torch.float32, CPU, whole)["QMoE"] == 2
    for kernels, quantization in ((CPU, partial), (CUDA, whole)):
        found = lowered(torch.float32, kernels, quantization)
        assert (found["QMoE"], found["MoE"]) == (0, 2) and found["MatMulNBits"] > 0


def test_cuda_computes_in_fp16() -> None:
    """Where the CPU's kernel takes fp32, and keeps its input for what follows."""
    cuda, cpu = lowered(torch.float16, CUDA), lowered(torch.float16, CPU)
    assert cuda["MoE"] == cpu["MoE"] == 2
    assert (cuda[aten.where.self], cpu[aten.where.self]) == (0, 2)
    assert cpu[aten.to.dtype] - cuda[aten.to.dtype] == 2 * 2  # a layer's tokens, and what its experts make of them
