"""One LoRA on a pipeline: identity, reference, formats, and everything that must not be loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmc_hub.adapters import adaptable_modules
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler

SAMPLE = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))


def planner(seed: int = 0, *, levels: int = 10, shift: float = 0.0) -> DiffuserPlannerPipeline:
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    torch.manual_seed(seed)
    return DiffuserPlannerPipeline(
        TemporalUnet(4, dim=8, dim_mults=(1, 2)),
        TransitionScheduler(levels, prediction_type="sample"),
        Normalizer.from_data(np.repeat(ends, 3, 1) + np.float32(shift), ends),
        horizon=4,
        num_inference_steps=3,
    )


def disturb(pipeline: DiffuserPlannerPipeline, seed: int = 0) -> DiffuserPlannerPipeline:
    """Move the trainable parameters, as training does."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pipeline.denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    return pipeline


def adapted(seed: int = 0, **settings: Any) -> DiffuserPlannerPipeline:
    pipeline = planner()
    pipeline.add_lora(LoraConfig(**{"r": 2, "lora_alpha": 6, **settings}))
    return disturb(pipeline, seed)


def output(pipeline: DiffuserPlannerPipeline) -> Tensor:
    with torch.no_grad():
        return pipeline.denoiser(SAMPLE, 3).sample


# Adding, disabling, removing


def test_a_fresh_lora_is_the_identity_and_only_it_trains() -> None:
    pipeline = planner()
    foundation = output(pipeline)
    state = torch.get_rng_state()
    pipeline.add_lora(LoraConfig(r=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(pipeline), foundation)
    trainable = {name for name, p in pipeline.denoiser.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in pipeline.denoiser.named_parameters() if ".lora_" in name}
    assert pipeline.lora_names == ["default"]


def test_the_seed_fixes_the_initialisation() -> None:
    def weights(seed: int) -> Tensor:
        pipeline = planner()
        pipeline.add_lora(LoraConfig(r=2), seed=seed)
        return pipeline.denoiser.head[1].lora_A["default"].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_every_linear_and_convolution_is_adapted_and_nothing_else() -> None:
    pipeline = planner()
    names = adaptable_modules(pipeline.denoiser)
    pipeline.add_lora(LoraConfig(r=2))
    wrapped = {n.rsplit(".lora_A", 1)[0] for n, _ in pipeline.denoiser.named_modules() if n.endswith(".lora_A")}
    assert wrapped == set(names)
    assert (
        len(names) == 32
    )  # 8 blocks of 2 convolutions and 1 linear layer, 3 residual, 1 down, 2 for time, 2 at the head


def test_the_callers_config_is_left_alone() -> None:
    config = LoraConfig(r=2)
    planner().add_lora(config)
    assert config.target_modules is None
    policy = DiffusionPolicyPipeline(
        DiffusionTransformer1D(1, 3, dim=8, num_heads=2, depth=1), TransitionScheduler(4), planner().normalizer
    )
    policy.add_lora(config)
    assert policy.lora_names == ["default"]


def test_disabled_is_the_foundation_bit_for_bit_also_when_nested() -> None:
    pipeline = adapted()
    foundation, trained = output(planner()), output(pipeline)
    assert not torch.allclose(trained, foundation, atol=1e-2)
    with pipeline.lora_disabled():
        assert torch.equal(output(pipeline), foundation)
        with pipeline.lora_disabled():
            assert torch.equal(output(pipeline), foundation)
        assert torch.equal(output(pipeline), foundation)
    assert torch.equal(output(pipeline), trained)
    with pytest.raises(ZeroDivisionError), pipeline.lora_disabled():
        raise ZeroDivisionError
    assert torch.equal(output(pipeline), trained)


def test_the_lora_still_learns_after_it_was_disabled() -> None:
    pipeline = adapted()
    with pipeline.lora_disabled():
        pass
    pipeline.denoiser(SAMPLE, 3).sample.sum().backward()
    gradients = {name: p.grad for name, p in pipeline.denoiser.named_parameters() if p.grad is not None}
    assert gradients
    assert all(".lora_" in name for name in gradients)


def test_unloading_restores_a_trainable_foundation() -> None:
    pipeline = adapted()
    pipeline.unload_lora()
    assert torch.equal(output(pipeline), output(planner()))
    assert pipeline.denoiser.state_dict().keys() == planner().denoiser.state_dict().keys()
    assert all(parameter.requires_grad for parameter in pipeline.denoiser.parameters())
    assert pipeline.lora_names == []
    pipeline.unload_lora()


@pytest.mark.filterwarnings("ignore:Adapter b was active")
def test_two_adapters() -> None:
    pipeline = adapted()
    first = output(pipeline)
    pipeline.add_lora(LoraConfig(r=3), adapter_name="b", seed=1)
    assert torch.equal(output(pipeline), output(planner()))  # only the new one is active, and it is the identity
    assert pipeline.lora_names == ["default", "b"]
    pipeline.unload_lora("b")
    assert torch.equal(output(pipeline), first)
    with pytest.raises(ValueError, match=r"`adapter_name` 'b' is not on this pipeline; it has \['default'\]"):
        pipeline.unload_lora("b")
    with pytest.raises(ValueError, match="`adapter_name` 'default' is already on this pipeline"):
        pipeline.add_lora(LoraConfig(r=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["nope"]}, "does not describe a LoRA for this denoiser: Target modules {'nope'}"),
        ({"r": 0}, "`config` does not describe a LoRA for this denoiser: `r` should be a positive integer"),
        ({"bias": "all"}, "`config.bias` must leave the base as it is: one of .'none',., got 'all'"),
        ({"modules_to_save": ["head.1"]}, "`config.modules_to_save` must leave the base as it is"),
        (
            {"init_lora_weights": "pissa", "target_modules": ["head.1"]},
            "`config.init_lora_weights` must leave",
        ),
    ],
)
def test_a_bad_config_leaves_the_pipeline_as_it_was(settings: dict[str, Any], message: str) -> None:
    pipeline = planner()
    fingerprint = pipeline.base_fingerprint()
    with pytest.raises(ValueError, match=message):
        pipeline.add_lora(LoraConfig(**settings))
    assert_untouched(pipeline, fingerprint)
    pipeline.add_lora(LoraConfig(r=2))


def test_without_an_adapter_there_is_nothing_to_disable_or_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no LoRA adapter to disable"), planner().lora_disabled():
        pass
    with pytest.raises(ValueError, match=r"`adapter_name` 'default' is not on this pipeline; it has \[\]"):
        planner().save_lora_weights(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_pipeline_with_a_lora_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries a LoRA adapter: save the adapter with `save_lora_weights`"):
        adapted().save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


# Saving and loading


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["head.1"]}])
def test_saved_and_loaded_is_bit_identical(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = adapted(**settings)
    trained.save_lora_weights(tmp_path)
    loaded = planner()
    loaded.load_lora_weights(tmp_path, adapter_name="again")
    assert loaded.lora_names == ["again"]
    assert torch.equal(output(loaded), output(trained))
    assert not torch.equal(output(loaded), output(planner()))
    expected, got = (p(np.zeros(3, np.float32), generator=0).action for p in (trained, loaded))
    np.testing.assert_array_equal(got, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "pytorch_lora_weights.safetensors",
    ]


def test_plain_peft_loads_the_adapter(tmp_path: Path) -> None:
    trained = adapted()
    trained.save_lora_weights(tmp_path)
    assert peft.load_peft_weights(str(tmp_path)).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    model = peft.PeftModel.from_pretrained(planner().denoiser, str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(SAMPLE, 3).sample, output(trained))


def test_plain_diffusers_loads_the_adapter(tmp_path: Path) -> None:
    trained = adapted()
    trained.save_lora_weights(tmp_path)
    bare = planner()
    bare.denoiser.load_lora_adapter(
        str(tmp_path), prefix="denoiser", use_safetensors=True, weight_name="pytorch_lora_weights.safetensors"
    )
    assert torch.equal(output(bare), output(trained))


def assert_untouched(pipeline: DiffuserPlannerPipeline, fingerprint: str) -> None:
    assert pipeline.lora_names == []
    assert pipeline.base_fingerprint() == fingerprint
    assert pipeline.denoiser.state_dict().keys() == planner().denoiser.state_dict().keys()
    assert all(parameter.requires_grad for parameter in pipeline.denoiser.parameters())


BASES = {
    "other weights": lambda: planner(seed=1),
    "other schedule": lambda: planner(levels=20),
    "other statistics": lambda: planner(shift=1e-3),
}


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: str) -> None:
    adapted().save_lora_weights(tmp_path)
    other = BASES[base]()
    fingerprint = other.base_fingerprint()
    with pytest.raises(
        ValueError,
        match=r"was trained on another base: on a base without a name with the fingerprint .*; this pipeline is `Diff",
    ):
        other.load_lora_weights(tmp_path)
    assert_untouched(other, fingerprint)


def test_the_fingerprint_is_of_the_base_alone(tmp_path: Path) -> None:
    pipeline = planner()
    fingerprint = pipeline.base_fingerprint()
    assert adapted().base_fingerprint() == fingerprint
    pipeline.scheduler.set_timesteps(3)
    assert pipeline.base_fingerprint() == fingerprint
    pipeline.save_pretrained(tmp_path)
    assert DiffuserPlannerPipeline.from_pretrained(tmp_path).base_fingerprint() == fingerprint


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors and keep the metadata."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata=metadata)


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HEAD = "base_model.model.head.1.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "foreign key": (
        lambda folder: rewrite(folder, lambda state: {**state, "x.lora_A.weight": torch.ones(1)}),
        "does not fit this denoiser: unknown key x.lora_A.weight",
    ),
    "missing key": (
        lambda folder: rewrite(folder, lambda state: {k: v for k, v in state.items() if k != HEAD}),
        "does not fit this denoiser: missing key head.1.lora_A.weight",
    ),
    "shape": (
        lambda folder: rewrite(folder, lambda state: {**state, HEAD: torch.ones(2, 7, 1)}),
        r"head.1.lora_A.weight has shape \(2, 7, 1\) instead of \(2, 8, 1\)",
    ),
    "NaN": (
        lambda folder: rewrite(folder, lambda state: {**state, HEAD: state[HEAD] * float("nan")}),
        "head.1.lora_A.weight is not finite",
    ),
    "truncated": (truncate, "adapter_model.safetensors` is damaged: "),
    "empty": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "is damaged: "),
    "no fingerprint": (
        lambda folder: save_file(
            load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors", metadata={}
        ),
        "adapter_config.json` and adapter_model.safetensors disagree on r, ",
    ),
    "alpha": (lambda folder: configure(folder, lora_alpha=600), "disagree on lora_alpha: one was changed"),
    "rank": (lambda folder: configure(folder, r=4), "disagree on r: "),
    "targets": (lambda folder: configure(folder, target_modules=["head.1"]), "disagree on target_modules: "),
    "mixed targets": (
        lambda folder: configure(folder, target_modules=["head.1", True]),
        "disagree on target_modules: ",
    ),
    "kind": (lambda folder: configure(folder, peft_type="LOHA"), "is not a usable adapter configuration: it does not"),
    "unknown setting": (lambda folder: configure(folder, rr=2), "is not a usable adapter configuration: .*'rr'"),
    "overwrites the base": (
        lambda folder: configure(folder, init_lora_weights="pissa"),
        "`config.init_lora_weights` must leave the base as it is",
    ),
    "not JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "is not JSON: Expecting",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_pipeline_unchanged(tmp_path: Path, damage: str) -> None:
    adapted().save_lora_weights(tmp_path)
    pipeline = planner()
    fingerprint = pipeline.base_fingerprint()
    inflict, message = DAMAGES[damage]
    inflict(tmp_path)
    with pytest.raises(ValueError, match=r"is missing|is truncated|longer than it was written|was changed"):
        pipeline.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(tmp_path, verify=False)
    assert_untouched(pipeline, fingerprint)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, missing: str) -> None:
    adapted().save_lora_weights(tmp_path)
    (tmp_path / missing).unlink()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"is not an adapter: it has no file {missing}"):
        planner().load_lora_weights(tmp_path)


def test_loading_over_an_adapter_of_the_same_name_keeps_that_one(tmp_path: Path) -> None:
    adapted(seed=1).save_lora_weights(tmp_path)
    pipeline = adapted()
    before = output(pipeline)
    with pytest.raises(ValueError, match="`adapter_name` 'default' is already on this pipeline"):
        pipeline.load_lora_weights(tmp_path)
    assert torch.equal(output(pipeline), before)


def test_from_pretrained_computes_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    """Weights that stay in the mapped file lie at other alignments, for which the kernels round otherwise."""
    for seed in range(3):
        pipeline = planner(seed)
        pipeline.save_pretrained(tmp_path / str(seed))
        loaded = DiffuserPlannerPipeline.from_pretrained(tmp_path / str(seed))
        assert torch.equal(output(loaded), output(pipeline))
