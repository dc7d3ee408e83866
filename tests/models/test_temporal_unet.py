"""Size, shapes and refusals of Diffuser's U-Net."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from dmc_hub.models.temporal_unet import TemporalUnet, sinusoidal_embedding


def tiny() -> TemporalUnet:
    torch.manual_seed(0)
    return TemporalUnet(3, dim=8, dim_mults=(1, 2, 4))


def test_parameter_count_of_the_original_for_hopper() -> None:
    assert sum(parameter.numel() for parameter in TemporalUnet(transition_dim=14).parameters()) == 3_956_302


@pytest.mark.parametrize("horizon", [4, 8, 32])
def test_output_has_the_shape_of_the_input_at_every_horizon(horizon: int) -> None:
    model, sample = tiny(), torch.randn(2, horizon, 3)
    output = model(sample, 5).sample
    assert output.shape == sample.shape
    assert torch.equal(model(sample, 5, return_dict=False)[0], output)


def test_a_number_and_one_timestep_per_sample_mean_the_same() -> None:
    model, sample = tiny(), torch.randn(2, 4, 3)
    each = model(sample, torch.tensor([5, 5])).sample
    torch.testing.assert_close(model(sample, 5).sample, each, rtol=1e-5, atol=1e-6)
    mixed = model(sample, torch.tensor([5, 9])).sample
    torch.testing.assert_close(mixed[1], model(sample, 9).sample[1])
    assert not torch.allclose(mixed[1], model(sample, 5).sample[1])


def test_every_parameter_is_used() -> None:
    model = tiny()
    model(torch.randn(2, 8, 3), torch.tensor([3, 7])).sample.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_do_not_mix() -> None:
    model, sample = tiny(), torch.randn(2, 8, 3, requires_grad=True)
    model(sample, 3).sample[0].sum().backward()
    assert sample.grad is not None
    assert sample.grad[0].any()
    assert not sample.grad[1].any()


def test_time_embedding_by_hand() -> None:
    # Frequencies 10000^(-k / (dim / 2 - 1)): 1 and 1 / 10000 for dim 4.
    embedding = sinusoidal_embedding(torch.tensor([2]), 4)
    expected = torch.tensor([[2.0, 2e-4]])
    torch.testing.assert_close(embedding, torch.cat([expected.sin(), expected.cos()], dim=-1))


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 8, 4), (8, 3), (2, 3, 8)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    message = r"`sample` must have shape \(batch, horizon, 3\) with a horizon divisible by 4 .* got \(" + str(shape[0])
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape), 0)


def test_conditions_and_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="`condition` must be None: TemporalUnet is conditioned by in-painting"):
        tiny()(torch.zeros(1, 4, 3), 0, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"`dim` must be divisible by 8, .* got 12"):
        TemporalUnet(3, dim=12)
    with pytest.raises(ValueError, match="`kernel_size` must be odd, got 4"):
        TemporalUnet(3, kernel_size=4)


def test_save_and_load(tmp_path: Path) -> None:
    model, sample = tiny(), torch.randn(2, 4, 3)
    model.save_pretrained(tmp_path)
    loaded = TemporalUnet.from_pretrained(tmp_path)
    assert loaded.config.dim_mults == [1, 2, 4]
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name])
    torch.testing.assert_close(loaded(sample, 1).sample, model(sample, 1).sample, rtol=1e-4, atol=1e-5)


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_what_is_kept_changes_no_bit() -> None:
    model, sample = tiny(), torch.randn(2, 4, 3)
    calls = count_calls(model.time_embedding[0])
    with torch.no_grad():
        expected = {step: model(sample, step).sample for step in (3, 7)}
        for _ in range(3):
            with model.while_unchanged():
                for step in (3, 7, 3):
                    assert torch.equal(model(sample, step).sample, expected[step])
    assert len(calls) == 2 + 2


@pytest.mark.parametrize("name", ["time_embedding.0.weight", "up.0.second.time_projection.1.bias"])
def test_kept_values_follow_the_weights(name: str) -> None:
    """Also where they are written behind autograd's back, as an average of the weights is put in their place."""
    model, sample = tiny(), torch.randn(2, 4, 3)
    with torch.no_grad():
        with model.while_unchanged():
            before = model(sample, 3).sample
        model.get_parameter(name).data.mul_(2)
        with model.while_unchanged():
            after = model(sample, 3).sample
        assert not torch.equal(before, after)
        assert torch.equal(after, model(sample, 3).sample)


def test_an_adapter_is_never_overlooked() -> None:
    model, sample = tiny(), torch.randn(2, 4, 3)
    model.add_adapter(
        LoraConfig(target_modules=["time_embedding.0", "middle.first.time_projection.1"], init_lora_weights=False)
    )
    with torch.no_grad(), model.while_unchanged():
        adapted = model(sample, 3).sample
        model.disable_adapters()
        base = model(sample, 3).sample
    assert not torch.allclose(adapted, base)


def test_gradients_pass_by_what_is_kept() -> None:
    model, sample = tiny(), torch.randn(2, 4, 3)
    with torch.no_grad(), model.while_unchanged():
        model(sample, 3)
    with model.while_unchanged():
        model(sample, 3).sample.sum().backward()
    weight = model.get_parameter("time_embedding.0.weight")
    assert weight.grad is not None
    assert weight.grad.any()
