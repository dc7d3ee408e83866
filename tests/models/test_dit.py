"""Initialisation, shapes and refusals of the diffusion transformer."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dmc_hub.models.dit import DiffusionTransformer1D, modulate


def tiny(condition_dim: int = 2) -> DiffusionTransformer1D:
    torch.manual_seed(0)
    return DiffusionTransformer1D(3, condition_dim, dim=16, num_heads=4, depth=2, timestep_dim=8)


def trained(condition_dim: int = 2) -> DiffusionTransformer1D:
    """With every parameter away from its initial value, as after training."""
    model = tiny(condition_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.mark.parametrize(
    ("sizes", "difference", "cleandiffuser"),
    [
        # Decision Diffuser, Hopper: CleanDiffuser has an MLP 32 -> 128 -> 128 on Fourier features of the timestep.
        ((11, 0), -(32 * 128 + 128 + 128 * 128 + 128), 4_073_547),
        # Diffusion Policy, Push-T: also, our embedding of the condition 10 -> 320 -> 320 is outside of its network.
        ((2, 10), -(32 * 128 + 128 + 128 * 128 + 128) + (10 * 320 + 320 + 320 * 320 + 320), 4_067_778),
    ],
)
def test_parameter_counts_of_the_originals(sizes: tuple[int, int], difference: int, cleandiffuser: int) -> None:
    with torch.device("meta"):
        model = DiffusionTransformer1D(*sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == cleandiffuser + difference


def test_output_is_zero_and_blocks_are_the_identity_at_initialisation() -> None:
    model = tiny()
    assert not model(torch.randn(2, 5, 3), 3, torch.randn(2, 2)).sample.any()
    x, embedding = torch.randn(2, 5, 16), torch.randn(2, 16)
    for block in cast(Any, model.blocks):
        assert torch.equal(block(x, block.modulation(embedding)), x)


def test_what_is_zero_at_initialisation_still_learns() -> None:
    """Zero weights on both sides of a product would never move: after one step the output is no longer zero."""
    model, sample, condition = tiny(), torch.randn(2, 5, 3), torch.randn(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(sample, 3, condition).sample - 1).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_equals_torchs_multihead_attention() -> None:
    block: Any = trained().blocks[0]
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(block.qkv.weight)
        reference.in_proj_bias.copy_(block.qkv.bias)
        reference.out_proj.load_state_dict(block.projection.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block.attention(x), reference(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_modulate_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert modulate(x, torch.tensor([[10.0, 0.0]]), torch.tensor([[1.0, -1.0]])).tolist() == [[[12, 0], [16, 0]]]


@pytest.mark.parametrize("horizon", [1, 7])
def test_shapes(horizon: int) -> None:
    model, sample, condition = trained(), torch.randn(2, horizon, 3), torch.randn(2, 2)
    output = model(sample, 3, condition).sample
    assert output.shape == sample.shape
    each = model(sample, torch.tensor([3, 3]), condition, return_dict=False)[0]
    torch.testing.assert_close(each, output, rtol=1e-5, atol=1e-6)


def test_time_condition_and_position_matter_and_samples_do_not_mix() -> None:
    model, sample, condition = trained(), torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 2)
    output = model(sample, 3, condition).sample
    assert not torch.allclose(output, model(sample, 9, condition).sample)
    assert not torch.allclose(output, model(sample, 3, condition + 1).sample)
    assert not torch.allclose(output.flip(1), model(sample.flip(1), 3, condition).sample, atol=1e-4)
    output[0].sum().backward()
    assert sample.grad is not None
    assert sample.grad[0].any()
    assert not sample.grad[1].any()


@pytest.mark.parametrize(
    ("sample", "condition", "message"),
    [
        (torch.zeros(2, 5, 4), torch.zeros(2, 2), r"`sample` must have shape \(batch, horizon, 3\), got \(2, 5, 4\)"),
        (torch.zeros(5, 3), torch.zeros(2, 2), r"`sample` must have shape \(batch, horizon, 3\), got \(5, 3\)"),
        (torch.zeros(2, 5, 3), torch.zeros(1, 2), r"`condition` must have shape \(2, 2\), got \(1, 2\)"),
        (torch.zeros(2, 5, 3), None, r"`condition` must have shape \(2, 2\), got None"),
    ],
)
def test_wrong_shapes_are_refused(sample: Tensor, condition: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(sample, 0, condition)


def test_a_model_without_condition_takes_none() -> None:
    model = tiny(condition_dim=0)
    assert model(torch.zeros(1, 5, 3), 0).sample.shape == (1, 5, 3)
    with pytest.raises(ValueError, match=r"`condition` must have shape None, got \(1, 2\)"):
        model(torch.zeros(1, 5, 3), 0, torch.zeros(1, 2))


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`dim` must be even and divisible by `num_heads`, got 10 and 4"):
        DiffusionTransformer1D(3, dim=10, num_heads=4)
    with pytest.raises(ValueError, match="`timestep_dim` must be even, got 9"):
        DiffusionTransformer1D(3, dim=8, num_heads=4, timestep_dim=9)


def test_save_and_load(tmp_path: Path) -> None:
    model, sample, condition = trained(), torch.randn(2, 5, 3), torch.randn(2, 2)
    model.save_pretrained(tmp_path)
    loaded = DiffusionTransformer1D.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample, 1, condition).sample, model.eval()(sample, 1, condition).sample)


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("condition_dim", [0, 2])
def test_what_is_kept_changes_no_bit(condition_dim: int) -> None:
    model, sample = trained(condition_dim), torch.randn(2, 5, 3)
    condition = torch.randn(2, 2) if condition_dim else None
    calls = count_calls(model.time_embedding[0])
    with torch.no_grad():
        expected = {step: model(sample, step, condition).sample for step in (3, 7)}
        for _ in range(3):
            with model.while_unchanged():
                for step in (3, 7, 3):
                    assert torch.equal(model(sample, step, condition).sample, expected[step])
    assert len(calls) == 2 + 2


@pytest.mark.parametrize("name", ["time_embedding.0.weight", "blocks.1.modulation.1.bias", "modulation.1.weight"])
def test_kept_values_follow_the_weights(name: str) -> None:
    """Also where they are written behind autograd's back, as an average of the weights is put in their place."""
    model, sample = trained(0), torch.randn(2, 5, 3)
    with torch.no_grad():
        with model.while_unchanged():
            before = model(sample, 3, None).sample
        model.get_parameter(name).data.mul_(2)
        with model.while_unchanged():
            after = model(sample, 3, None).sample
        assert not torch.equal(before, after)
        assert torch.equal(after, model(sample, 3, None).sample)


def test_an_adapter_is_never_overlooked() -> None:
    model, sample = trained(0), torch.randn(2, 5, 3)
    model.add_adapter(LoraConfig(target_modules=["time_embedding.0", "modulation.1"], init_lora_weights=False))
    with torch.no_grad(), model.while_unchanged():
        adapted = model(sample, 3, None).sample
        model.disable_adapters()
        base = model(sample, 3, None).sample
    assert not torch.allclose(adapted, base)


def test_gradients_pass_by_what_is_kept() -> None:
    model, sample = trained(0), torch.randn(2, 5, 3)
    with torch.no_grad(), model.while_unchanged():
        model(sample, 3, None)
    with model.while_unchanged():
        model(sample, 3, None).sample.sum().backward()
    weight = model.get_parameter("time_embedding.0.weight")
    assert weight.grad is not None
    assert weight.grad.any()


def test_a_condition_is_encoded_once_while_it_stays() -> None:
    model, sample, condition = trained(2), torch.randn(2, 5, 3), torch.randn(2, 2)
    assert model.condition_embedding is not None
    calls = count_calls(model.condition_embedding)
    with torch.no_grad():
        expected = [model(sample, 3, each).sample for each in (condition, condition + 1)]
        with model.while_unchanged():
            for step in (3, 5):
                model(sample, step, condition)
            assert len(calls) == 2 + 1
            assert torch.equal(model(sample, 3, condition + 1).sample, expected[1])
        condition += 1
        with model.while_unchanged():
            assert torch.equal(model(sample, 3, condition).sample, expected[1])
