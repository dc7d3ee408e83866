"""Size, shapes and refusals of Diffuser's U-Net."""

from pathlib import Path

import pytest
import torch

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
    assert torch.equal(model(sample, 5).sample, model(sample, torch.tensor([5, 5])).sample)
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
