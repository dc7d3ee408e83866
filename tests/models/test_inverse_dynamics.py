"""Size, a solved problem, adapters and refusals of Decision Diffuser's inverse dynamics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dmc_hub.adapters import adaptable_modules
from dmc_hub.models.inverse_dynamics import InverseDynamics


def tiny() -> InverseDynamics:
    torch.manual_seed(0)
    return InverseDynamics(3, 2, (16, 16))


OBSERVATIONS, NEXT_OBSERVATIONS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))


def output(model: InverseDynamics) -> Tensor:
    with torch.no_grad():
        return model(OBSERVATIONS, NEXT_OBSERVATIONS)


def test_parameter_count_of_the_original_for_hopper() -> None:
    with torch.device("meta"):
        model = InverseDynamics(11, 3)
    by_hand = (22 * 512 + 512) + (512 * 512 + 512) + (512 * 3 + 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 275_971


def test_actions_by_hand_without_hidden_layers() -> None:
    """a = (o' - o) / 2, the inverse of o' = o + 2 a; without bounds on the output."""
    model = InverseDynamics(1, 1, ())
    layer: Any = model.network[0]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.5, 0.5]]))
        layer.bias.zero_()
    actions = model(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [-5.0]]))
    assert actions.tolist() == [[1], [-3]]


def test_it_learns_the_inverse_of_a_linear_system() -> None:
    torch.manual_seed(0)
    model, observations, actions = InverseDynamics(3, 2, (64, 64)), torch.randn(512, 3), torch.rand(512, 2) * 2 - 1
    next_observations = observations @ torch.randn(3, 3) * 0.5 + actions @ torch.randn(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(observations, next_observations) - actions).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * actions.var()


@pytest.mark.parametrize("batch", [(), (4,), (2, 5)])
def test_any_batch_shape(batch: tuple[int, ...]) -> None:
    model, observations, next_observations = tiny(), torch.randn(*batch, 3), torch.randn(*batch, 3)
    actions = model(observations, next_observations)
    assert actions.shape == (*batch, 2)
    row = model(observations.reshape(-1, 3)[:1], next_observations.reshape(-1, 3)[:1])
    torch.testing.assert_close(actions.reshape(-1, 2)[:1], row)


def test_both_observations_and_their_order_matter() -> None:
    model = tiny()
    actions = output(model)
    assert not torch.allclose(actions, model(OBSERVATIONS + 1, NEXT_OBSERVATIONS), atol=1e-3)
    assert not torch.allclose(actions, model(OBSERVATIONS, NEXT_OBSERVATIONS + 1), atol=1e-3)
    assert not torch.allclose(actions, model(NEXT_OBSERVATIONS, OBSERVATIONS), atol=1e-3)


def test_every_parameter_is_used() -> None:
    model = tiny()
    model(OBSERVATIONS, NEXT_OBSERVATIONS).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_weights_take_and_return_float32() -> None:
    precise, half = output(tiny()), output(tiny().to(torch.bfloat16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, precise, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_on_every_layer_trains_and_is_bit_exact_when_off(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    foundation = output(model)
    model.add_adapter(LoraConfig(r=2, target_modules=set(adaptable_modules(model))))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    assert torch.equal(output(model), foundation)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is 0 at first, so that A learns from the second step on
        optimizer.zero_grad()
        model(OBSERVATIONS, NEXT_OBSERVATIONS).square().sum().backward()
        optimizer.step()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unused == []
    assert not torch.allclose(output(model), foundation, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(output(model), foundation)


def test_gradient_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="InverseDynamics does not support gradient checkpointing"):
        tiny().enable_gradient_checkpointing()


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = InverseDynamics.from_pretrained(tmp_path)
    assert loaded.config.hidden_dims == [16, 16]
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name])
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"), [((2, 3), (2, 4)), ((2, 4), (2, 4)), ((2, 3), (1, 3)), ((2, 3), (3,)), ((), ())]
)
def test_wrong_shapes_are_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    message = r"`observations` and `next_observations` must have the same shape \(\.\.\., 3\), got "
    with pytest.raises(ValueError, match=message) as error:
        tiny()(torch.zeros(first), torch.zeros(second))
    assert str(error.value).endswith(f"got {first} and {second}.")
