"""gpt-oss: attention with sinks, and experts with biases and a capped SwiGLU, which lie in memory in their own way."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import make_inputs, materialise, run_graph, tiny_model, transformers_forward
from families import pop_by_hooks
from steps import Step, compile_in_steps, run_onnx
from transformers import GptOssConfig, PreTrainedModel

from popcompile.export.providers import PROVIDERS
from popcompile.passes import ExpertKernels, PassManager, Quantization, lowering, ops
from popcompile.passes.onnx_ops import onnx_op_type
from popcompile.pruning.sampling import _attend_to_all

PRUNED = [1]


def gpt_oss() -> GptOssConfig:
    """Two of four experts; a window, and a limit that activations reach."""
    return GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"], sliding_window=8, swiglu_limit=0.7,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@cache
def compiled() -> tuple[PreTrainedModel, dict[str, Step]]:
    model = tiny_model(gpt_oss())
    return model, compile_in_steps(model.config, PRUNED)


def lowered(quantization: Quantization | None = None) -> Step:
    """For the CPU's kernels."""
    program = compiled()[1]["PadHeads"].program.clone()
    PassManager(lowering(quantization, ExpertKernels(**PROVIDERS["cpu"].experts))[1:]).run(program)
    return Step("lowered", program, {})


def test_graph_is_the_model() -> None:
    """In PyTorch; logits of a prompt longer than the window are those of transformers' module."""
    model, steps = compiled()
    program = steps["AnnotateLayers"].program
    inputs = make_inputs(model, [12])
    logits, _ = run_graph(materialise(program.graphs["model"], program, model.state_dict()), inputs)
    torch.testing.assert_close(logits, transformers_forward(model, inputs.ids)[0], rtol=1e-4, atol=1e-4)


def test_sinks_and_limit_count() -> None:
    """So that agreement says something."""
    model, _ = compiled()
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = transformers_forward(model, ids)[0]
    for name, value in (("sinks", -1e4), ("limit", 1e4)):
        other = tiny_model(gpt_oss())
        for module in other.modules():
            if name == "sinks" and hasattr(module, name):
                torch.nn.init.constant_(module.sinks, value)
            elif hasattr(module, name):
                module.limit = value
        assert (transformers_forward(other, ids)[0] - expected).abs().max() > 0.05


@pytest.mark.parametrize("block", [4, 100])
def test_lowered_prefill(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ONNX Runtime, in blocks within the window and across it, and in one."""
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], query_block=block))
    model, _ = compiled()
    inputs = [make_inputs(model, [n]) for n in (1, 5, 30)]
    results = run_onnx(tmp_path, lowered(), "prefill", model, inputs)
    for given, (logits, _) in zip(inputs, results, strict=True):
        expected, _ = pop_by_hooks(model, given.ids, PRUNED)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_quantized(tmp_path: Path) -> None:
    """Experts' biases go along; 8 bits, multiplied in int8, change logits by some hundredths of them."""
    model, inputs = compiled()[0], [make_inputs(compiled()[0], [9])]
    step = lowered(Quantization(8, 16))
    assert any(onnx_op_type(n) == "QMoE" for n in step.program.graphs["decode"].graph.nodes)
    ((logits, _),) = run_onnx(tmp_path, step, "decode", model, inputs)
    expected, _ = transformers_forward(model, inputs[0].ids)
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_sampling_attends_to_sinks() -> None:
    """The attention of calibration's sampling is that of the graph."""
    random = torch.Generator().manual_seed(0)
    query, sinks = torch.randn(2, 4, 1, 8, generator=random), torch.randn(4, generator=random)
    key, value = (torch.randn(2, 2, 5, 8, generator=random) for _ in range(2))
    positions = torch.full((2, 1), 4)
    expected = ops.attention(query, key, value, positions, 0.3, 3, 0.0, sinks)
    torch.testing.assert_close(_attend_to_all(query, key, value, positions, 0.3, 3, 0.0, sinks), expected)
