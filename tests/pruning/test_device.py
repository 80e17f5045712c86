"""Calibration on another device: a simulated one, for the CPU computes, where tensors are and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Cli, tiny_llama
from image_attention_reference import gemma3
from PIL import Image
from simulated_gpu import GPU, GpuTensor, SimulatedGpu, simulated_gpu
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vision_checkpoint import save_gemma_checkpoint
from vision_reference import random_model
from vision_subject import VisionSubject
from words import save_tiny, save_words

import popcompile
from popcompile import conversion
from popcompile.package.report import Loss
from popcompile.pruning import execution, search, text
from popcompile.pruning.analyze import analyze
from popcompile.pruning.device import CPU
from popcompile.pruning.execution import HeldParameters, materialise
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.image_prompts import ImagePrompts
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.plan import Plan, make_plan
from popcompile.pruning.refinement import refine
from popcompile.pruning.regression import calibrate
from popcompile.pruning.rows import decoder_inputs
from popcompile.pruning.sampling import sample_behind
from popcompile.pruning.steps import KeptSteps

#: tokens that models of images have room for, and of prompts
CONTEXT, TOKENS = 96, 48
#: what a model multiplies in; a plan may compute nothing of it on the CPU
PRODUCTS = {"linear", "matmul", "scaled_dot_product_attention"}


@pytest.fixture(autouse=True)
def the_same_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs products are rounded to bf16 for speed, which is not done for a GPU."""
    monkeypatch.setattr(execution, "rounds_in_avx512", lambda: False)


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as simulated:
        yield simulated


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that has the words of lists."""
    folder = tmp_path_factory.mktemp("device") / "model"
    save_tiny(folder, tiny_llama(vocab_size=128, num_hidden_layers=4, max_position_embeddings=64))
    words = ("".join(letters) for letters in product("bdfgklmnpr", "aeiou", "nt", ("a", "e")))
    pieces = ["<unk>", *map(str, range(10)), *',.|{}:-"', *words][:128]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that decide and measure, and of lists."""
    for name, count in {"HELD_OUT": 3, "_MOST_ASKED": 4, "_REFINING": 8}.items():
        monkeypatch.setattr(text, name, count)


# --- the simulation --------------------------------------------------------------------------------------------

MIXED, GENERATOR = "two devices, cuda:0 and cpu", "'cuda' device type for generator"


@pytest.mark.parametrize(
    ("mixes", "complaint"),
    [
        (lambda x: x + torch.ones(3), MIXED),
        (lambda x: torch.ones(3).add_(x), MIXED),
        (lambda x: torch.ones(3) * x.sum(), MIXED),
        (lambda x: torch.cat((torch.ones(3), x)), MIXED),
        (lambda x: torch.ones(2, 3) @ x, MIXED),
        (lambda x: x.gather(0, torch.tensor([1])), MIXED),
        (lambda x: torch.ones(3)[x.long()], MIXED),
        (lambda x: x.index_put_((torch.tensor([1]),), torch.ones(1)), MIXED),
        (lambda x: torch.nn.functional.linear(torch.ones(3), x[None]), MIXED),
        (lambda x: torch.multinomial(x, 1, generator=torch.Generator()), GENERATOR),
        (lambda x: torch.rand(3, device=x.device, generator=torch.Generator()), GENERATOR),
        (lambda x: torch.ops.aten._assert_tensor_metadata(x, device=torch.device("cpu")), "device mismatch"),
    ],
)
def test_what_cuda_refuses_is_refused(mixes: Callable[[torch.Tensor], Any], complaint: str, gpu: SimulatedGpu) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        mixes(torch.ones(3, device="cuda"))


def test_what_cuda_allows(gpu: SimulatedGpu) -> None:
    x = torch.arange(3.0).to(GPU)
    assert isinstance(x, GpuTensor) and x.device == GPU and not isinstance(x.cpu(), GpuTensor)
    assert (x + torch.tensor(1.0))[torch.tensor([2, 0])].tolist() == [3, 1]
    assert isinstance(torch.tensor(2.0) * x, GpuTensor) and (torch.tensor(2.0) * x).tolist() == [0, 2, 4]
    y = torch.zeros(2, 3)
    y[1] = x
    assert y.tolist() == [[0, 0, 0], [0, 1, 2]] and not isinstance(y, GpuTensor)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    torch.ones(2, 3) @ torch.ones(3)
    assert gpu.on_the_cpu() == {"matmul"}


# --- plans -----------------------------------------------------------------------------------------------------


class Planned(Exception):
    """What comes after it is of no interest."""


def plan_on_both(model: Path, free: int = 10**12, **asked: Any) -> Plan:
    """A conversion's plan, which on the CPU is the same but for rounding. free: bytes on the GPU."""
    plans: list[Plan] = []

    def twice(*arguments: Any, **options: Any) -> Plan:
        plans.append(make_plan(*arguments, **options))
        with simulated_gpu(free) as gpu:
            plans.append(make_plan(*arguments, **options | {"device": GPU}))
        assert gpu.products.keys() >= {(name, True) for name in PRODUCTS} and not gpu.on_the_cpu()
        raise Planned

    with patch.object(conversion, "make_plan", twice), pytest.raises(Planned):
        popcompile.convert(model, model.with_name("out"), **asked)
    assert_same_plan(plans[1], plans[0])
    return plans[1]


def assert_same_plan(found: Plan, expected: Plan) -> None:
    assert (found.pruned, found.window) == (expected.pruned, expected.window)
    ours, theirs = found.constants(), expected.constants()
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in theirs.items():
        assert not isinstance(ours[name], GpuTensor), name
        torch.testing.assert_close(ours[name], tensor)
    assert found.sections == approximately(expected.sections)


def approximately(values: Any) -> Any:
    """JSON whose numbers may differ by rounding."""
    if isinstance(values, dict):
        return {name: approximately(value) for name, value in values.items()}
    if isinstance(values, list):
        return [approximately(value) for value in values]
    return pytest.approx(values, rel=1e-4, nan_ok=True) if isinstance(values, float) else values


@pytest.mark.usefixtures("few_texts")
def test_what_is_chosen(checkpoint: Path) -> None:
    """Sampled text, candidates, lists of answers, refinement, factors of activations."""
    asked = {"window": 16, "max_kl": 2.0, "calibration_texts": 8, "refinement_steps": 1, "dtype": "w8a8"}
    found = plan_on_both(checkpoint, **asked)
    assert len(found.pruned) == 2 and found.factors and found.calibration.projections
    assert found.sections["quality"]["loss"]["retrieval_found"] is not None


@pytest.mark.usefixtures("few_texts")
def test_weights_that_are_streamed(checkpoint: Path) -> None:
    """A GPU that has not the room for the model; a bypass, and gradients that read weights again."""
    words = save_words(checkpoint.with_name("words.txt"), 0, 3000)
    asked = {"layers": "1,3", "calibration": str(words), "calibration_texts": 8, "refinement_steps": 1}
    assert plan_on_both(checkpoint, free=200_000, **asked).calibration.bypasses.keys() == {1}


def calibrated_on_images(subject: VisionSubject, device: torch.device) -> tuple[dict[str, torch.Tensor], Loss]:
    """Tokens that were sampled behind prompts, features of pictures, and maps; and what these lose."""
    program, read = subject.program, HeldParameters(subject.read, device)
    prompts = ImagePrompts(subject.images.processor, subject.images.inputs, program, read)
    pictures = [Image.new("RGB", (32, 16 * size), (90 * size, 80, 200)) for size in (1, 2)]
    written = [prompts.write(["w8 w9", picture], TOKENS, range(60, 70), 0) for picture in pictures]
    rows = prompts.rows([prompt for prompt in written if prompt is not None], TOKENS + 4)
    rows = sample_behind(program, read, rows, [TOKENS] * len(rows), seed=0)
    model = LayerwiseModel(materialise(program.graphs["model"], program, read), decoder_inputs(program, read))
    states = HiddenStates(model, rows, first=1)
    maps = refine(states, [1, 2], calibrate(states, [1, 2]), steps=1)
    loss = HeldOut(model, rows, 1, TOKENS, seed=0, window=4).measure([1, 2], maps)
    assert rows.images is not None
    return {"ids": rows.ids, "features": rows.images.features, **maps.to(CPU).constants()}, loss


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_images(family: str, tmp_path: Path) -> None:
    """Their tower, their embeddings, what is added between layers, and tokens that see all of an image."""
    if family == "gemma3":
        model = random_model(gemma3(layers=4, max_position_embeddings=CONTEXT))
        subject = VisionSubject(model, save_gemma_checkpoint(model, tmp_path / "model"))
    else:
        subject = VisionSubject.saved(tmp_path / "model", max_position_embeddings=CONTEXT, num_hidden_layers=4)
    expected, expected_loss = calibrated_on_images(subject, CPU)
    with simulated_gpu() as gpu:
        found, loss = calibrated_on_images(subject, GPU)
    assert not gpu.on_the_cpu()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    assert asdict(loss) == approximately(asdict(expected_loss))


@pytest.mark.usefixtures("few_texts")
def test_steps_that_another_device_has_kept(checkpoint: Path, tmp_path: Path) -> None:
    """They are good for any: nothing of them is computed."""
    kept, plans = KeptSteps(tmp_path / "steps", {"of": "a test"}), list[Plan]()

    def twice(*arguments: Any, **options: Any) -> Plan:
        plans.append(make_plan(*arguments, **options | {"steps": kept}))
        with simulated_gpu(), patch.object(search, "calibrate", None), patch.object(search, "refine", None):
            plans.append(make_plan(*arguments, **options | {"steps": kept, "device": GPU}))
        raise Planned

    asked = {"layers": "1,3", "calibration_texts": 8, "refinement_steps": 1}
    with patch.object(conversion, "make_plan", twice), pytest.raises(Planned):
        popcompile.convert(checkpoint, tmp_path / "out", **asked)
    assert_same_plan(plans[1], plans[0])


def test_importance(checkpoint: Path) -> None:
    expected = analyze(checkpoint, texts=2, tokens=12).importance
    with simulated_gpu() as gpu:
        found = analyze(checkpoint, texts=2, tokens=12, device="cuda").importance
    assert gpu.products.keys() >= {(name, True) for name in PRODUCTS}
    for name, values in asdict(expected).items():
        assert getattr(found, name) == pytest.approx(values, rel=1e-4), name


# --- what the user is told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["convert", "none/such", "out"], ["analyze", "none/such"]])
@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("cuda", "--device cuda: no CUDA device: torch"),
        ("cuda:1", "or give --device cpu"),
        ("gpu", "--device gpu: unknown; give cpu, cuda, or cuda:N"),
        ("cuda:-1", "--device cuda:-1: unknown"),
        ("meta", "--device meta: unknown"),
        ("", "--device : unknown"),
    ],
)
def test_a_device_that_is_not_there(
    command: list[str], device: str, complaint: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is told before the model is looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert complaint in cli.refuses(*command, "--device", device)


def test_a_gpu_of_another_number(cli: Cli, gpu: SimulatedGpu) -> None:
    complaint = "--device cuda:3: not there; give one from cuda:0 to cuda:0"
    assert complaint in cli.refuses("convert", "none/such", "out", "--device", "cuda:3")


def test_a_gpu_that_gets_full(
    cli: Cli, checkpoint: Path, tmp_path: Path, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, device: torch.device, **__: Any) -> Plan:
        assert device == GPU
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(conversion, "make_plan", full)
    line = cli.refuses("convert", checkpoint, tmp_path / "out", "--device", "cuda:0")
    assert "--device cuda:0: its memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB.)" in line
