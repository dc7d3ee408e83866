"""Size, parity with torch's decoder, causality, adapters and refusals of Diffusion Policy's transformer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dmc_hub.adapters import adaptable_modules
from dmc_hub.models.action_transformer import ActionTransformer, sinusoidal_embedding


def tiny(**settings: Any) -> ActionTransformer:
    """With weights of order 0.3 as after training: at initialisation attention is almost uniform."""
    torch.manual_seed(0)
    model = ActionTransformer(2, 3, **{"num_observation_steps": 4, "horizon": 6, "dim": 16, "depth": 2, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


SAMPLE = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(1))
CONDITION = torch.randn(2, 4 * 3, generator=torch.Generator().manual_seed(2))


def output(model: ActionTransformer) -> Tensor:
    with torch.no_grad():
        return model(SAMPLE, 3, CONDITION).sample


# Size


def parameters_by_hand(observation_dim: int, horizon: int, depth: int, dim: int = 256, action_dim: int = 2) -> int:
    """Weights and biases of real-stanford/diffusion_policy's network for 2 observations, without condition layers."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    attention = linear(dim, 3 * dim) + linear(dim, dim)
    block = 2 * attention + linear(dim, 4 * dim) + linear(4 * dim, dim) + 3 * 2 * dim
    embeddings = linear(action_dim, dim) + horizon * dim + linear(observation_dim, dim) + (1 + 2) * dim
    encoder = linear(dim, 4 * dim) + linear(4 * dim, dim)
    return embeddings + encoder + depth * block + 2 * dim + linear(dim, action_dim)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"observation_dim": 20, "horizon": 16, "depth": 8}, 8_965_122),  # Diffusion Policy, Push-T, keypoints
        # CleanDiffuser's 5.27 M less an MLP 256 -> 1024 -> 256 that it builds and never calls.
        ({"observation_dim": 5, "horizon": 10, "depth": 4}, 5_271_554 - (256 * 1024 + 1024 + 1024 * 256 + 256)),
    ],
)
def test_parameter_counts_of_the_originals(settings: dict[str, int], expected: int) -> None:
    with torch.device("meta"):
        model = ActionTransformer(2, **settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_by_hand(**settings) == expected


def test_the_defaults_are_those_of_the_original() -> None:
    with torch.device("meta"):
        config = ActionTransformer(2, 20).config
    sizes = (config.num_observation_steps, config.horizon, config.dim, config.num_heads, config.depth)
    assert sizes == (2, 16, 256, 4, 8)


# What it computes


def torch_decoder(model: ActionTransformer) -> nn.TransformerDecoder:
    """torch's pre-norm decoder with the weights of `model`."""
    layer = nn.TransformerDecoderLayer(16, 4, 64, 0.0, activation="gelu", batch_first=True, norm_first=True)
    decoder = nn.TransformerDecoder(layer, 2)
    theirs: Any
    block: Any
    with torch.no_grad():
        for theirs, block in zip(decoder.layers, model.blocks, strict=True):
            own, cross = block.self_attention, block.cross_attention
            _copy_attention(theirs.self_attn, [own.qkv], own.projection)
            _copy_attention(theirs.multihead_attn, [cross.query, cross.key_value], cross.projection)
            for source, target in (
                (block.norm_self, theirs.norm1),
                (block.norm_cross, theirs.norm2),
                (block.norm_mlp, theirs.norm3),
                (block.mlp[0], theirs.linear1),
                (block.mlp[2], theirs.linear2),
            ):
                target.load_state_dict(source.state_dict())
    return decoder


def _copy_attention(attention: Any, inputs: list[Any], projection: Any) -> None:
    attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
    attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
    attention.out_proj.load_state_dict(projection.state_dict())


@pytest.mark.parametrize("causal_condition", [False, True])
def test_it_equals_the_original_built_of_torchs_decoder(causal_condition: bool) -> None:
    model = tiny(causal_condition=causal_condition)
    time = sinusoidal_embedding(torch.tensor([3, 3]), 16)[:, None]
    observations = model.observation_projection(CONDITION.reshape(2, 4, 3))
    memory = model.encoder(torch.cat([time, observations], dim=1) + model.memory_positions)
    # Step t sees steps 0 to t; of the memory (time, o_0, o_1, o_2, o_3) it sees time and o_0 to o_t.
    hidden_steps = torch.triu(torch.ones(6, 6, dtype=torch.bool), diagonal=1)
    hidden_memory = torch.triu(torch.ones(6, 5, dtype=torch.bool), diagonal=2) if causal_condition else None
    x = model.action_projection(SAMPLE) + model.action_positions
    x = torch_decoder(model)(x, memory, tgt_mask=hidden_steps, memory_mask=hidden_memory)
    torch.testing.assert_close(output(model), model.head(model.norm(x)), rtol=1e-4, atol=1e-4)


def test_a_step_depends_on_itself_and_on_earlier_ones_only() -> None:
    model, sample = tiny(), SAMPLE.clone().requires_grad_()
    for step in range(6):
        (gradient,) = torch.autograd.grad(model(sample, 3, CONDITION).sample[0, step].sum(), sample)
        assert gradient[0, : step + 1].all()
        assert not gradient[0, step + 1 :].any()
        assert not gradient[1].any()  # samples do not mix


@pytest.mark.parametrize("causal_condition", [False, True])
def test_observations_that_a_step_depends_on(causal_condition: bool) -> None:
    model, condition = tiny(causal_condition=causal_condition), CONDITION.clone().requires_grad_()
    for step in range(6):
        (gradient,) = torch.autograd.grad(model(SAMPLE, 3, condition).sample[0, step].sum(), condition)
        seen = step + 1 if causal_condition else 4
        assert gradient[0].reshape(4, 3)[:seen].all()
        assert not gradient[0].reshape(4, 3)[seen:].any()
        assert not gradient[1].any()


@pytest.mark.parametrize("causal_condition", [False, True])
def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(causal_condition: bool) -> None:
    model = tiny(causal_condition=causal_condition)
    for steps in (1, 4):
        short = model(SAMPLE[:, :steps], 3, CONDITION).sample
        torch.testing.assert_close(short, output(model)[:, :steps], rtol=1e-4, atol=1e-5)


def test_time_condition_and_position_matter() -> None:
    model = tiny()
    result = output(model)
    assert result.shape == SAMPLE.shape
    assert not torch.allclose(result, model(SAMPLE, 9, CONDITION).sample, atol=1e-3)
    assert not torch.allclose(result, model(SAMPLE, 3, CONDITION + 1).sample, atol=1e-3)
    swapped = CONDITION.reshape(2, 4, 3).flip(1).reshape(2, 12)
    assert not torch.allclose(result, model(SAMPLE, 3, swapped).sample, atol=1e-3)
    same = model(SAMPLE[:, :1].expand(-1, 6, -1), 3, CONDITION).sample
    assert not torch.allclose(same[:, 0], same[:, 1], atol=1e-3)


def test_a_number_and_one_timestep_per_sample_mean_the_same() -> None:
    model = tiny()
    assert torch.equal(output(model), model(SAMPLE, torch.tensor([3, 3]), CONDITION, return_dict=False)[0])
    mixed = model(SAMPLE, torch.tensor([9, 3]), CONDITION).sample
    torch.testing.assert_close(mixed[1], output(model)[1])
    assert not torch.allclose(mixed[0], output(model)[0], atol=1e-3)


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
        model, calls = tiny(causal_condition=True), 0
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.blocks[0].register_forward_pre_hook(recorded)
        model(SAMPLE, 3, CONDITION).sample.square().sum().backward()
        assert calls == (2 if checkpointing else 1)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


# Adapters and files


def test_a_lora_on_every_layer_trains_and_is_bit_exact_when_off() -> None:
    model = tiny()
    foundation = output(model)
    names = adaptable_modules(model)
    assert len(names) == 2 + 2 + 2 * (2 + 3 + 2) + 1  # inputs, encoder, blocks of 2 attentions and an MLP, head
    model.add_adapter(LoraConfig(r=2, target_modules=set(names)))
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
    model = tiny(causal_condition=True)
    model.save_pretrained(tmp_path)
    loaded = ActionTransformer.from_pretrained(tmp_path)
    assert loaded.config.causal_condition is True
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name])
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize("shape", [(2, 7, 2), (2, 6, 3), (6, 2)])
def test_wrong_samples_are_refused(shape: tuple[int, ...]) -> None:
    message = (
        r"`sample` must have shape \(batch, steps, 2\) with at most 6 steps, the `horizon` of this transformer; "
        r"got \(" + ", ".join(map(str, shape)) + r"\)"
    )
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape), 0, CONDITION)


@pytest.mark.parametrize("shape", [(1, 12), (2, 3), (2, 4, 3), None])
def test_wrong_conditions_are_refused(shape: tuple[int, ...] | None) -> None:
    condition = None if shape is None else torch.zeros(shape)
    message = r"`condition` must have shape \(2, 12\), 4 observations of 3; got "
    with pytest.raises(ValueError, match=message) as error:
        tiny()(SAMPLE, 0, condition)
    assert str(error.value).endswith(f"got {shape}.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 18}, "`dim` must be even and divisible by `num_heads`, got 18 and 4"),
        ({"dim": 9, "num_heads": 3}, "`dim` must be even and divisible by `num_heads`, got 9 and 3"),
        ({"horizon": 0}, "`num_observation_steps` and `horizon` must be positive, got 4 and 0"),
        ({"num_observation_steps": 0}, "`num_observation_steps` and `horizon` must be positive, got 0 and 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
