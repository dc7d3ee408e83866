"""Twin Q-functions and V against weights set by hand."""

from pathlib import Path

import pytest
import torch

from dmc_hub.models.critic import TwinQCritic


def linear_critic() -> TwinQCritic:
    """Without hidden layers: Q1 = 5 (o + 2 a), Q2 = 5 (3 - a), V = 5 (o - 1)."""
    critic = TwinQCritic(1, 1, hidden_dims=(), value_scale=5.0)
    with torch.no_grad():
        for network, weight, bias in ((critic.q_1, [1, 2], 0), (critic.q_2, [0, -1], 3), (critic.v, [1], -1)):
            network[0].weight.copy_(torch.tensor([weight]))
            network[0].bias.fill_(bias)
    return critic


def test_values_by_hand() -> None:
    critic, observations = linear_critic(), torch.tensor([[1.0], [1.0]])
    actions = torch.tensor([[0.0], [2.0]])
    q_1, q_2 = critic.twin_q(observations, actions)
    assert q_1.tolist() == [5, 25]
    assert q_2.tolist() == [15, 5]
    assert critic(observations, actions).tolist() == [5, 5]  # the smaller one of each
    assert critic.value(observations + 1).tolist() == [5, 5]


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_any_batch_shape(batch: tuple[int, ...], layer_norm: bool) -> None:
    torch.manual_seed(0)
    critic = TwinQCritic(3, 2, (8, 8), layer_norm=layer_norm)
    observations, actions = torch.randn(*batch, 3), torch.randn(*batch, 2)
    values = critic(observations, actions)
    assert values.shape == critic.value(observations).shape == batch
    row = critic(observations.reshape(-1, 3)[:1], actions.reshape(-1, 2)[:1])
    torch.testing.assert_close(values.flatten()[:1], row)


def test_the_three_networks_share_nothing() -> None:
    torch.manual_seed(0)
    critic = TwinQCritic(3, 2, (8,))
    critic.twin_q(torch.randn(4, 3), torch.randn(4, 2))[0].sum().backward()
    with_gradient = {name.split(".")[0] for name, p in critic.named_parameters() if p.grad is not None}
    assert with_gradient == {"q_1"}


def test_bfloat16_weights_take_and_return_float32() -> None:
    torch.manual_seed(0)
    critic = TwinQCritic(3, 2, (8,))
    observations, actions = torch.randn(4, 3), torch.randn(4, 2)
    precise = critic(observations, actions)
    half = critic.to(torch.bfloat16)(observations, actions)
    assert half.dtype == critic.value(observations).dtype == torch.float32
    torch.testing.assert_close(half, precise, rtol=0.05, atol=0.05)


def test_save_and_load(tmp_path: Path) -> None:
    critic = linear_critic()
    critic.save_pretrained(tmp_path)
    loaded = TwinQCritic.from_pretrained(tmp_path)
    assert loaded(torch.ones(1, 1), torch.zeros(1, 1)).tolist() == [5]
    assert loaded.value(torch.zeros(1, 1)).tolist() == [-5]


def test_values_of_action_sequences() -> None:
    """Q1 = o + a_1 + 2 a_2."""
    critic = TwinQCritic(1, 1, hidden_dims=(), num_action_steps=2)
    with torch.no_grad():
        critic.q_1[0].weight.copy_(torch.tensor([[1.0, 1.0, 2.0]]))
        critic.q_1[0].bias.zero_()
    observations, actions = torch.tensor([[1.0], [2.0]]), torch.tensor([[[3.0], [4.0]], [[0.0], [1.0]]])
    assert critic.twin_q(observations, actions)[0].tolist() == [12, 4]
    assert critic(observations[:, None].expand(-1, 5, -1), actions[:, None].expand(-1, 5, -1, -1)).shape == (2, 5)
