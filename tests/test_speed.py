"""What makes acting fast changes nothing else: compiled forms, memory, imports."""

from __future__ import annotations

import gc
import inspect
import itertools
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dmc_hub import compilation
from dmc_hub.benchmarks.plan import SAMPLERS, PlannerSizes
from dmc_hub.compilation import ChannelsLastUnet, CompilationWarning, CompiledNetwork, fused_denoise
from dmc_hub.models import dit, temporal_unet
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffusionPolicyPipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own import
TINY = PlannerSizes(observation_dim=3, action_dim=2, horizon=8, dim=8, dim_mults=(1, 2, 4), num_inference_steps=6)


@pytest.fixture
def eager() -> Any:
    """torch.compile without its compiler: what is compiled is run line by line."""
    with torch.compiler.set_stance("force_eager"):
        yield


def moved(network: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.eval()


# ---- The channels-last form -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"draft_dim": 3}, {"kernel_size": 3, "head_kernel_size": 5}, {"dim_mults": (1,)}, {"dim": 32}],
    ids=str,
)
def test_the_channels_last_form_is_the_same_function(options: dict[str, Any]) -> None:
    network = moved(TemporalUnet(5, **{"dim": 8, "dim_mults": (1, 2, 4), **options}))
    sample = torch.randn(3, 8, 5 + options.get("draft_dim", 0))
    shifts = network.time_shifts(3, sample)
    expected = network.denoise(sample, shifts)
    torch.testing.assert_close(ChannelsLastUnet(network)(sample, shifts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x", [-90.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 90.0])
def test_mish_with_one_exponential(x: float) -> None:
    value = torch.tensor([x])
    torch.testing.assert_close(compilation._mish(value), nn.functional.mish(value), rtol=1e-5, atol=1e-7)


def test_the_channels_last_form_follows_weights_and_adapters() -> None:
    network = moved(TemporalUnet(5, dim=8, dim_mults=(1, 2)))
    packed, sample = ChannelsLastUnet(network), torch.randn(3, 8, 5)

    def check() -> Tensor:
        assert packed.follow(network)
        shifts = network.time_shifts(3, sample)
        output = packed(sample, shifts)
        torch.testing.assert_close(output, network.denoise(sample, shifts), rtol=1e-4, atol=1e-5)
        return output

    with torch.no_grad():
        outputs = [check()]
        for name in ("down.0.first.block_in.0.weight", "up.0.resample.weight", "middle.first.block_out.1.bias"):
            network.get_parameter(name).data.mul_(1.5)  # as an average of the weights is put in their place
            outputs.append(check())
        convolutions = [name for name, each in network.named_modules() if isinstance(each, nn.Conv1d)]
        network.add_adapter(LoraConfig(target_modules=convolutions, init_lora_weights=False))
        outputs.append(check())
        network.disable_adapters()
        assert torch.equal(check(), outputs[-2])
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(outputs))


def test_an_adapter_that_cannot_be_added_is_computed_as_before(eager: None) -> None:
    network = moved(TemporalUnet(5, dim=8, dim_mults=(1, 2)))
    network.add_adapter(LoraConfig(target_modules=["down.0.first.block_in.0"], use_dora=True))
    compiled, sample = CompiledNetwork(network), torch.randn(3, 8, 5)
    with torch.no_grad():
        with pytest.warns(CompilationWarning, match="not compiled and computes as before"), compiled.while_unchanged():
            output = compiled(sample, 3)[0]
        assert torch.equal(output, network(sample, 3).sample)


# ---- The transformer's form that is compiled ------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"draft_dim": 3}, {"normalized_residual": True}, {"condition_dim": 4}, {"position_embedding": "positional"}],
    ids=str,
)
def test_the_fused_transformer_is_the_same_function(options: dict[str, Any]) -> None:
    network = moved(DiffusionTransformer1D(5, **{"dim": 16, "num_heads": 2, **options}))
    sample, condition = torch.randn(3, 8, 5 + options.get("draft_dim", 0)), None
    if "condition_dim" in options:
        condition = torch.randn(3, 4)
    outputs = []
    for _ in range(2):
        modulations = network.modulations(3, condition, sample)
        outputs.append(network.denoise(sample, modulations))
        fused = fused_denoise(network, sample, modulations)
        torch.testing.assert_close(fused, outputs[-1], rtol=1e-4, atol=1e-5)
        if len(outputs) == 1:
            targets = ["blocks.0.qkv", "blocks.1.mlp.0", "blocks.1.mlp.2", "head"]
            network.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False))
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("x", [-1e30, -90.0, -5.0, -0.5, 0.0, 1e-4, 1.0, 5.0, 90.0, 1e30])
def test_gelu_with_one_exponential(x: float) -> None:
    value = torch.tensor([x])
    expected = nn.functional.gelu(value.double(), approximate="tanh").float()
    torch.testing.assert_close(compilation._gelu(value), expected, rtol=1e-5, atol=1e-7)


def test_layer_norm_in_two_sums() -> None:
    x = 3.0 * torch.randn(4, 320) + 100.0
    expected = nn.functional.layer_norm(x.double(), (320,), eps=1e-6).float()
    torch.testing.assert_close(compilation._norm(x, 1e-6), expected, rtol=1e-4, atol=1e-4)


# ---- compile() ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_compiled_planner_acts_the_same_and_trains_bit_for_bit(sampler: str, eager: None) -> None:
    plain, compiled = TINY.build(sampler), TINY.build(sampler)
    compiled.compile()
    observation = TINY.observation()
    expected, actual = (each(observation, num_candidates=4, generator=0) for each in (plain, compiled))
    np.testing.assert_allclose(actual.trajectories, expected.trajectories, rtol=1e-3, atol=1e-3)
    assert not np.array_equal(actual.trajectories, expected.trajectories), "the graph was not used"
    condition = plain.observation_condition(torch.randn(4, 3))
    with torch.no_grad():
        samples = [each.sample(condition, generator=torch.Generator().manual_seed(1)) for each in (plain, compiled)]
    assert torch.equal(*samples)


def test_a_compiled_policy_acts_the_same(eager: None) -> None:
    parts = TINY.build()
    denoiser = moved(DiffusionTransformer1D(2, 3, dim=16, num_heads=2))
    policy = DiffusionPolicyPipeline(denoiser, parts.scheduler, parts.normalizer, parts.critic, horizon=8)
    calls: list[int] = []
    observation = TINY.observation()
    expected = policy(observation, num_candidates=4, generator=0)
    policy.compile()
    denoiser.denoise = lambda *inputs: calls.append(1)  # what was compiled is bound already
    np.testing.assert_allclose(
        policy(observation, num_candidates=4, generator=0).candidates, expected.candidates, rtol=1e-5, atol=1e-5
    )
    assert not calls


def test_without_a_compiler_everything_stays_exactly_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    planner, observation = TINY.build(), TINY.observation()
    expected = planner(observation, generator=0)
    with monkeypatch.context() as changed:
        changed.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent/compiler",))
        with pytest.warns(CompilationWarning, match="is not compiled and computes as before: there is no C\\+\\+"):
            planner.compile()
    np.testing.assert_array_equal(planner(observation, generator=0).trajectories, expected.trajectories)


def test_bfloat16_multiplies_in_that_precision_alone() -> None:
    network = moved(TemporalUnet(5, dim=8, dim_mults=(1, 2)))
    sample, shifts = torch.randn(3, 8, 5), network.time_shifts(3, torch.zeros(1, 8, 5))
    packed = ChannelsLastUnet(network, torch.bfloat16)
    output, expected = packed(sample, shifts), network.denoise(sample, shifts)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0.1, atol=0.1)
    assert not torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


# ---- Memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["DDPM", "DPM-Solver++(2M)"])
def test_sampling_holds_no_more_latents_with_more_steps(sampler: str) -> None:
    """Tensors of the latents' size that are alive when the network is called, in the last step."""

    def most(num_inference_steps: int) -> int:
        planner = TINY.build(sampler)
        condition = planner.observation_condition(torch.randn(7, 3))
        counts: list[int] = []

        def count(*_: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                alive = [each for each in gc.get_objects() if isinstance(each, Tensor)]
            counts.append(sum(each.shape == condition["values"].shape for each in alive))

        planner.denoiser.register_forward_pre_hook(count)
        with torch.no_grad():
            planner.sample(condition, num_inference_steps=num_inference_steps)
        return max(counts[-2:])

    few, many = most(4), most(12)
    assert few == many <= 6


# ---- Imports --------------------------------------------------------------------------------------------


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys; print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stderr.split())


HEAVY = ("transformers", "diffusers", "datasets", "peft", "accelerate", "matplotlib", "scipy", "pyarrow", "pandas")


def test_importing_the_library_loads_nothing_heavy() -> None:
    loaded = modules_after("import dmc_hub")
    assert "dmc_hub.envs" in loaded
    assert [name for name in (*HEAVY, "torch") if name in loaded] == []


def test_the_command_lines_help_loads_nothing_heavy() -> None:
    code = "import contextlib, dmc_hub.cli as cli\nwith contextlib.suppress(SystemExit): cli.main(['--help'])"
    loaded = modules_after(code)
    assert "dmc_hub.cli" in loaded
    assert [name for name in (*HEAVY, "torch") if name in loaded] == []


def test_copies_of_one_class_are_the_same() -> None:
    """Each file of a model travels to the Hub alone."""
    for name in ("StepCache", "_are_equal"):
        assert inspect.getsource(getattr(dit, name)) == inspect.getsource(getattr(temporal_unet, name))
