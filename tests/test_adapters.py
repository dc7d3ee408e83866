"""Several adapters on one foundation: switching, blending, fusing, swapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.trainers.cascade import warm_start_upsampler
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

OBSERVATIONS = np.linspace(-0.9, 0.9, 6, dtype=np.float32).reshape(2, 3)
CONFIGS = {
    "a": LoraConfig(r=2, lora_alpha=6),
    "b": LoraConfig(r=3, lora_alpha=3, use_rslora=True),
    "c": LoraConfig(r=1, lora_alpha=2),
}


@pytest.fixture(params=["planner", "policy", "upsampler"])
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Makes the same foundation at every call."""

    def make() -> Any:
        ends = np.array([[-1.0], [1.0]], dtype=np.float32)
        scheduler, normalizer = TransitionScheduler(10), Normalizer.from_data(np.repeat(ends, 3, 1), ends)
        torch.manual_seed(0)
        if request.param == "policy":
            denoiser = DiffusionTransformer1D(1, 3, dim=8, num_heads=2, depth=1)
            nn.init.normal_(denoiser.head.weight, std=0.1)
            return DiffusionPolicyPipeline(denoiser, scheduler, normalizer, num_inference_steps=3)
        planner = DiffuserPlannerPipeline(
            TemporalUnet(4, dim=8, dim_mults=(1, 2)), scheduler, normalizer, horizon=4, num_inference_steps=3
        )
        if request.param == "planner":
            return planner
        warm_start_upsampler(planner)
        return planner.upsampler_policy()

    return make


def adapted(make: Callable[[], Any], *names: str, seed: int = 0) -> Any:
    """A controller with the adapters of those names, none of which is the identity."""
    controller = make()
    source = torch.Generator().manual_seed(seed)
    for name in names:
        controller.add_lora(CONFIGS[name], adapter_name=name)
    for name, parameter in controller.denoiser.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=source)
    return controller


def output(controller: Any) -> Tensor:
    """The prediction at a sample, as the network computes it now."""
    condition = controller.observation_condition(torch.from_numpy(OBSERVATIONS))
    source = torch.Generator().manual_seed(1)
    latents = torch.randn(controller.latent_shape(2), generator=source)
    if controller.adapted_component == "upsampler":
        condition["draft"] = torch.randn(controller.latent_shape(2), generator=source)
    with torch.no_grad():
        return controller.predict(latents, 4, condition)


def cast(controller: Any, dtype: torch.dtype) -> None:
    for name in ("denoiser", "upsampler"):
        if controller.components.get(name) is not None:
            nn.Module.to(controller.components[name], dtype)


def blended(make: Callable[[], Any], controller: Any, weights: dict[str, float]) -> Any:
    """A foundation whose weights are `W + sum_i w_i s_i B_i A_i`, computed here."""
    scalings = {"a": 6 / 2, "b": 3 / 3**0.5, "c": 2 / 1}
    result = make()
    cast(result, controller.denoiser.dtype)
    state, expected = controller.denoiser.state_dict(), result.denoiser.state_dict()
    for name, weight in weights.items():
        for key in [key for key in state if key.endswith(f".lora_A.{name}.weight")]:
            layer = key.removesuffix(f".lora_A.{name}.weight")
            down, up = state[key], state[f"{layer}.lora_B.{name}.weight"]
            product = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
            expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + weight * scalings[name] * product
    result.denoiser.load_state_dict(expected)
    return result


def test_a_blend_adds_the_weighted_products_to_the_base(make: Callable[[], Any]) -> None:
    controller = adapted(make, "a", "b", "c")
    assert controller.get_active_adapters() == ["c"]  # the last that was added
    cast(controller, torch.float64)
    for weights in ({"a": 0.7, "b": -0.4}, {"a": 1.0}, {"b": 1.0}, {"c": 0.25, "a": 1.5, "b": 0.0}):
        controller.set_adapters(list(weights), list(weights.values()))
        assert controller.get_active_adapters() == list(weights)
        assert controller.adapter_weights == pytest.approx({**controller.adapter_weights, **weights})
        torch.testing.assert_close(output(controller), output(blended(make, controller, weights)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output(controller), output(blended(make, controller, {})), atol=1e-2)


def test_weights_default_to_one_and_one_number_is_for_all(make: Callable[[], Any]) -> None:
    controller = adapted(make, "a", "b")
    controller.set_adapters("a")
    alone = output(controller)
    controller.set_adapters(["a", "b"], 0.5)
    assert controller.adapter_weights == pytest.approx({"a": 0.5, "b": 0.5})
    controller.set_adapters(["a", "b"], [None, 0.0])
    torch.testing.assert_close(output(controller), alone, rtol=1e-4, atol=1e-6)
    controller.set_adapters("a")
    assert torch.equal(output(controller), alone)
    with controller.lora_disabled():
        assert torch.equal(output(controller), output(make()))


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a", "z"], None, r"`adapter_names` must be different names of adapters .*\['a', 'b'\]; got \['a', 'z'\]"),
        (["a", "a"], None, "`adapter_names` must be different names"),
        ([], None, "`adapter_names` must be different names"),
        (["a", "b"], [1.0], r"`adapter_weights` must be one finite number for each of \['a', 'b'\], got \[1.0\]"),
        (["a"], float("nan"), "`adapter_weights` must be one finite number"),
    ],
)
def test_wrong_names_and_weights_change_nothing(
    make: Callable[[], Any], names: Any, weights: Any, message: str
) -> None:
    controller = adapted(make, "a", "b")
    before = output(controller)
    with pytest.raises(ValueError, match=message):
        controller.set_adapters(names, weights)
    assert torch.equal(output(controller), before)


def test_fused_adapters_compute_the_blend_and_unfusing_leaves_no_trace(make: Callable[[], Any]) -> None:
    controller = adapted(make, "a", "b", "c")
    controller.set_adapters(["a", "b"], [0.7, 0.3])
    before, fingerprint = output(controller), controller.base_fingerprint()
    state = {name: tensor.clone() for name, tensor in controller.denoiser.state_dict().items()}
    for names, scale, weights in (
        (None, 1.0, {"a": 0.7, "b": 0.3}),
        (["a"], 0.5, {"a": 0.35}),
        (["c", "b"], 2.0, {"c": 2.0, "b": 0.6}),
    ):
        controller.fuse_lora(names, lora_scale=scale)
        fused = output(controller)
        assert controller.base_fingerprint() == fingerprint
        controller.unfuse_lora()
        expected = blended(make, controller, weights)
        torch.testing.assert_close(fused, output(expected), rtol=1e-4, atol=1e-5)
        assert torch.equal(output(controller), before)
        assert controller.base_fingerprint() == fingerprint
        for name, tensor in controller.denoiser.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert controller.adapter_weights == pytest.approx({"a": 0.7, "b": 0.3, "c": 1.0})


def test_while_fused_the_adapters_stay_as_they_are(make: Callable[[], Any], tmp_path: Path) -> None:
    controller = adapted(make, "a", "b")
    controller.save_lora_weights(tmp_path / "a", adapter_name="a")
    controller.fuse_lora(["a"])
    fused = output(controller)

    def disable() -> None:
        with controller.lora_disabled():
            pass

    forbidden: list[Callable[[], Any]] = [
        lambda: controller.fuse_lora(["b"]),
        lambda: controller.set_adapters("b"),
        lambda: controller.add_lora(LoraConfig(r=1), adapter_name="c"),
        lambda: controller.unload_lora("b"),
        lambda: controller.unload_lora(),
        lambda: controller.load_lora_weights(tmp_path / "a", adapter_name="c"),
        lambda: controller.load_lora_weights(tmp_path / "a", adapter_name="a", hotswap=True),
        disable,
    ]
    for action in forbidden:
        with pytest.raises(ValueError, match=r"The adapters are fused: call `unfuse_lora\(\)` before you"):
            action()
    assert torch.equal(output(controller), fused)
    controller.save_lora_weights(tmp_path / "again", adapter_name="a")  # the adapter itself is what it was
    again, first = (_adapter_file(tmp_path / name) for name in ("again", "a"))
    assert again[1] == first[1]  # settings and fingerprint
    for name, tensor in again[0].items():
        assert torch.equal(tensor, first[0][name]), name
    controller.unfuse_lora()
    with pytest.raises(ValueError, match="No adapter is fused"):
        controller.unfuse_lora()


def _adapter_file(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def test_what_cannot_be_fused_is_refused_and_changes_nothing(make: Callable[[], Any]) -> None:
    controller = make()
    with pytest.raises(ValueError, match=r"`adapter_names` must be among the adapters \[\]; got \[\]"):
        controller.fuse_lora()
    controller = adapted(make, "a")
    before = output(controller)
    with pytest.raises(ValueError, match=r"must be among the adapters \['a'\]; got \['b'\]"):
        controller.fuse_lora(["b"])
    with pytest.raises(ValueError, match="`lora_scale` must be finite, got inf"):
        controller.fuse_lora(lora_scale=float("inf"))
    *_, last = (p for name, p in controller.denoiser.named_parameters() if ".lora_B" in name)
    kept = last.data.clone()
    last.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"The adapters \['a'\] cannot be fused: NaNs detected"):
        controller.fuse_lora()
    last.data.copy_(kept)
    assert torch.equal(output(controller), before)


def test_a_saved_adapter_knows_nothing_of_the_blend(make: Callable[[], Any], tmp_path: Path) -> None:
    controller = adapted(make, "a", "b")
    controller.set_adapters("a")
    alone = output(controller)
    controller.set_adapters(["b", "a"], [0.3, 0.6])
    controller.save_lora_weights(tmp_path, adapter_name="a")
    loaded = make()
    loaded.load_lora_weights(tmp_path, adapter_name="mine")
    assert loaded.adapter_weights == {"mine": 1.0}
    assert torch.equal(output(loaded), alone)


def test_an_adapter_is_swapped_under_its_name_whatever_its_rank(make: Callable[[], Any], tmp_path: Path) -> None:
    other = adapted(make, "c", seed=5)
    other.save_lora_weights(tmp_path, adapter_name="c")
    expected = adapted(make, "a", "b")
    expected.load_lora_weights(tmp_path, adapter_name="c")
    expected.set_adapters(["a", "c"], [0.5, 0.2])
    controller = adapted(make, "a", "b")
    controller.set_adapters(["a", "b"], [0.5, 0.2])
    controller.load_lora_weights(tmp_path, adapter_name="b", hotswap=True)
    assert controller.get_active_adapters() == ["a", "b"]
    assert controller.adapter_weights == pytest.approx({"a": 0.5, "b": 0.2})
    torch.testing.assert_close(output(controller), output(expected), rtol=1e-5, atol=1e-6)
    single = adapted(make, "b")
    single.load_lora_weights(tmp_path, adapter_name="b", hotswap=True)
    other.set_adapters("c")
    assert torch.equal(output(single), output(other))
    with pytest.raises(ValueError, match=r"`hotswap` replaces a loaded adapter, but `adapter_name` 'z' is not"):
        single.load_lora_weights(tmp_path, adapter_name="z", hotswap=True)


def test_a_failed_swap_leaves_what_was_there(make: Callable[[], Any], tmp_path: Path) -> None:
    narrow = make()
    narrow.add_lora(LoraConfig(r=2, lora_alpha=6), adapter_name="a")
    *_, last = (p for name, p in narrow.denoiser.named_parameters() if ".lora_B" in name)
    last.data.fill_(float("inf"))
    narrow.save_lora_weights(tmp_path, adapter_name="a")
    controller = adapted(make, "a", "b")
    controller.set_adapters(["a", "b"], [0.5, 2.0])
    before = output(controller)
    with pytest.raises(ValueError, match="is not finite"):
        controller.load_lora_weights(tmp_path, adapter_name="a", hotswap=True)
    assert torch.equal(output(controller), before)
    assert controller.get_active_adapters() == ["a", "b"]


def test_training_takes_the_adapter_alone_at_weight_one_and_no_fused_one() -> None:
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=50))
    config = SFTConfig(output_dir=None, disable_tqdm=True, max_steps=1, num_conditions=4, num_candidates=2)

    def policy() -> Any:
        torch.manual_seed(0)
        denoiser = DiffusionTransformer1D(1, 3, dim=8, num_heads=2, depth=1)
        normalizer = Normalizer.from_data(episodes.observations, episodes.actions)
        controller = DiffusionPolicyPipeline(denoiser, TransitionScheduler(10), normalizer, num_inference_steps=3)
        controller.add_lora(CONFIGS["a"])
        controller.add_lora(CONFIGS["b"], adapter_name="other")
        return controller

    def trained(controller: Any) -> dict[str, Tensor]:
        def reward(observations: Tensor, actions: Tensor) -> Tensor:
            return actions[:, 0, 0]

        SFTTrainer(controller, config, train_dataset=episodes, reward_function=reward).train()
        return {name: value for name, value in controller.denoiser.state_dict().items() if ".default." in name}

    plain, blend = policy(), policy()
    blend.set_adapters(["default", "other"], [0.5, 0.5])
    expected = trained(plain)
    for name, value in trained(blend).items():
        assert torch.equal(value, expected[name]), name
    assert blend.get_active_adapters() == ["default"]
    assert blend.adapter_weights["default"] == 1.0
    blend.fuse_lora()
    with pytest.raises(ValueError, match=r"The adapters are fused: call `unfuse_lora\(\)` before training"):
        trained(blend)
