"""Size, FiLM by hand, shapes, adapters and refusals of Diffusion Policy's U-Net."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dmc_hub.adapters import adaptable_modules
from dmc_hub.models.conditional_unet import ConditionalUnet1D, FiLMResidualBlock


def tiny(condition_dim: int = 3, **settings: Any) -> ConditionalUnet1D:
    torch.manual_seed(0)
    return ConditionalUnet1D(2, condition_dim, dims=(8, 16), timestep_dim=8, **settings)


SAMPLE = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(1))
CONDITION = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))


def output(model: ConditionalUnet1D) -> Tensor:
    with torch.no_grad():
        return model(SAMPLE, 3, CONDITION).sample


# Size


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_by_hand(action_dim: int, condition_dim: int, dims: tuple[int, ...], timestep_dim: int = 256) -> int:
    """Weights and biases of real-stanford/diffusion_policy's network, with kernel 5 and `cond_predict_scale`."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def convolution(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel + outputs

    def block(inputs: int, outputs: int) -> int:
        norms, film = 2 * 2 * outputs, linear(timestep_dim + condition_dim, 2 * outputs)
        residual = convolution(inputs, outputs, 1) if inputs != outputs else 0
        return convolution(inputs, outputs, 5) + convolution(outputs, outputs, 5) + norms + film + residual

    total = linear(timestep_dim, 4 * timestep_dim) + linear(4 * timestep_dim, timestep_dim)
    for inputs, outputs in pairwise((action_dim, *dims)):  # down: all but the last level halve with kernel 3
        total += block(inputs, outputs) + block(outputs, outputs)
        total += convolution(outputs, outputs, 3) if outputs != dims[-1] else 0
    total += 2 * block(dims[-1], dims[-1])
    for outputs, inputs in pairwise(dims):  # up: skip and input side by side, doubled with kernel 4
        total += block(2 * inputs, outputs) + block(outputs, outputs) + convolution(outputs, outputs, 4)
    return total + convolution(dims[0], dims[0], 5) + 2 * dims[0] + convolution(dims[0], action_dim, 1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"condition_dim": 10}, 65_353_218),  # Diffusion Policy, Push-T, state
        ({"condition_dim": 40}, 65_783_298),  # Diffusion Policy, Push-T, keypoints
        ({"condition_dim": 36, "timestep_dim": 128}, 63_497_090),  # LeRobot at Push-T's sizes: 63.5 M
        ({"condition_dim": 36, "timestep_dim": 128, "dims": (512, 1024, 2048)}, 248_759_426),  # its default: 248.8 M
        ({"condition_dim": 256}, 68_882_690 - (10 * 256 + 256)),  # CleanDiffuser's 68.9 M, less its linear encoder
    ],
)
def test_parameter_counts_of_the_originals(settings: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = ConditionalUnet1D(2, **settings)
    assert count(model) == parameters_by_hand(2, **{"dims": (256, 512, 1024), **settings}) == expected


def test_without_scale_each_block_predicts_half_as_much() -> None:
    # 8 blocks on (8, 8, 16, 16, 16, 16, 8, 8) channels, each from 8 + 3 numbers and a bias.
    assert count(tiny()) - count(tiny(cond_predict_scale=False)) == (8 + 3 + 1) * (4 * 8 + 4 * 16)


# What it computes


@pytest.mark.parametrize("predict_scale", [True, False])
def test_film_by_hand(predict_scale: bool) -> None:
    torch.manual_seed(0)
    block = FiLMResidualBlock(8, 8, 4, 3, predict_scale)
    scale, bias = torch.randn(8), torch.randn(8)
    film: Any = block.film[1]
    with torch.no_grad():
        film.weight.zero_()
        film.bias.copy_(torch.cat([scale, bias]) if predict_scale else bias)
    x = torch.randn(2, 8, 6)
    hidden = block.block_in(x)
    hidden = (scale[:, None] * hidden if predict_scale else hidden) + bias[:, None]
    torch.testing.assert_close(block(x, torch.randn(2, 4)), block.block_out(hidden) + x)


@pytest.mark.parametrize("horizon", [2, 8, 16])
@pytest.mark.parametrize("predict_scale", [True, False])
def test_shapes(horizon: int, predict_scale: bool) -> None:
    model, sample = tiny(cond_predict_scale=predict_scale), torch.randn(2, horizon, 2)
    result = model(sample, 3, CONDITION).sample
    assert result.shape == sample.shape
    assert torch.equal(model(sample, torch.tensor([3, 3]), CONDITION, return_dict=False)[0], result)


@pytest.mark.parametrize("predict_scale", [True, False])
def test_time_and_every_entry_of_the_condition_matter_and_samples_do_not_mix(predict_scale: bool) -> None:
    model = tiny(cond_predict_scale=predict_scale)
    sample, condition = SAMPLE.clone().requires_grad_(), CONDITION.clone().requires_grad_()
    result = model(sample, 3, condition).sample
    assert not torch.allclose(result, model(sample, 9, condition).sample, atol=1e-3)
    assert not torch.allclose(result, model(sample, 3, condition + 1).sample, atol=1e-3)
    result[0].square().sum().backward()
    for gradient in (sample.grad, condition.grad):
        assert gradient is not None
        assert gradient[0].all()
        assert not gradient[1].any()


def test_each_sample_has_its_own_timestep() -> None:
    mixed = tiny()(SAMPLE, torch.tensor([3, 9]), CONDITION).sample
    torch.testing.assert_close(mixed[:1], tiny()(SAMPLE[:1], 3, CONDITION[:1]).sample)
    torch.testing.assert_close(mixed[1:], tiny()(SAMPLE[1:], 9, CONDITION[1:]).sample)


def test_every_parameter_is_used() -> None:
    model = tiny()
    model(SAMPLE, torch.tensor([3, 7]), CONDITION).sample.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_checkpointing_recomputes_the_same_gradients() -> None:
    gradients, calls = [], 0

    def recorded(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for checkpointing in (False, True):
        model, calls = tiny(), 0
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.middle.register_forward_pre_hook(recorded)
        model(SAMPLE, 3, CONDITION).sample.square().sum().backward()
        assert calls == (2 if checkpointing else 1)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


# Adapters and files


def test_a_lora_on_every_layer_trains_and_is_bit_exact_when_off() -> None:
    model = tiny()
    foundation = output(model)
    model.add_adapter(LoraConfig(r=2, target_modules=set(adaptable_modules(model))))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    assert torch.equal(output(model), foundation)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # B is 0 at first, so that A learns from the second step on
        optimizer.zero_grad()
        model(SAMPLE, 3, CONDITION).sample.square().sum().backward()
        optimizer.step()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unused == []
    assert not torch.allclose(output(model), foundation, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(output(model), foundation)


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny(kernel_size=3, cond_predict_scale=False)
    model.save_pretrained(tmp_path)
    loaded = ConditionalUnet1D.from_pretrained(tmp_path)
    assert loaded.config.dims == [8, 16]
    assert (loaded.config.kernel_size, loaded.config.cond_predict_scale) == (3, False)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name])
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize("shape", [(2, 7, 2), (2, 8, 3), (8, 2), (2, 1, 2)])
def test_wrong_samples_are_refused(shape: tuple[int, ...]) -> None:
    message = (
        r"`sample` must have shape \(batch, horizon, 2\) with a horizon divisible by 2 "
        r"\(this U-Net halves it 1 times\), got \(" + ", ".join(map(str, shape)) + r"\)"
    )
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape), 0, CONDITION)


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (3,), None])
def test_wrong_conditions_are_refused(shape: tuple[int, ...] | None) -> None:
    condition = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=r"`condition` must have shape \(2, 3\), got ") as error:
        tiny()(SAMPLE, 0, condition)
    assert str(error.value).endswith(f"got {shape}.")


def test_a_model_without_condition_takes_none() -> None:
    model = tiny(condition_dim=0)
    assert model(SAMPLE, 0).sample.shape == SAMPLE.shape
    with pytest.raises(ValueError, match=r"`condition` must have shape None, got \(2, 3\)"):
        model(SAMPLE, 0, CONDITION)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": (8, 12)}, r"`dims` must be divisible by 8, the groups of the normalisation; got \(8, 12\)"),
        ({"dims": ()}, r"`dims` must be divisible by 8, .* got \(\)"),
        ({"kernel_size": 4}, "`kernel_size` must be odd, got 4: an even one changes the horizon"),
        ({"timestep_dim": 9}, "`timestep_dim` must be even, got 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalUnet1D(2, **settings)
