"""Pipelines and adapters to the Hub and back, over HTTP, with and without dmc_hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from safetensors.torch import load_file

from dmc_hub import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.hub import load_pipeline
from dmc_hub.models.dit import DiffusionTransformer1D


def test_a_pipeline_and_its_adapter_come_back_bit_for_bit(
    hub: Any, make_planner: Callable[..., Any], adapt: Callable[..., Any], act: Callable[..., Any]
) -> None:
    planner = make_planner()
    foundation = act(planner)
    pushed = planner.push_to_hub("alice/planner")
    aligned = act(adapt(planner))
    assert not np.allclose(aligned, foundation, atol=1e-3)
    planner.push_lora_to_hub("alice/planner-lora")
    loaded = DiffuserPlannerPipeline.from_pretrained("alice/planner")
    np.testing.assert_array_equal(act(loaded), foundation)
    loaded.load_lora_weights("alice/planner-lora")
    np.testing.assert_array_equal(act(loaded), aligned)
    assert loaded.task_metadata == planner.task_metadata
    assert loaded.task_metadata["environment"] == "dmc_hub/Nav1D-v0"
    card = ModelCard.load("alice/planner-lora").data.to_dict()
    assert (card["base_model"], card["base_model_relation"]) == ("alice/planner", "adapter")
    assert (card["library_name"], card["pipeline_tag"]) == ("diffusers", "reinforcement-learning")
    config = json.loads(hub.files("alice/planner-lora")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("alice/planner", pushed.revision)


def test_revision_variant_and_dtype(hub: Any, make_planner: Callable[..., Any], act: Callable[..., Any]) -> None:
    first = make_planner(0).push_to_hub("alice/planner")
    make_planner(1).push_to_hub("alice/planner", variant="seed1")
    make_planner(2).push_to_hub("alice/planner", revision="other")
    load = DiffuserPlannerPipeline.from_pretrained
    for options, seed in (
        ({"revision": first.revision}, 0),
        ({"variant": "seed1"}, 1),
        ({"revision": "other"}, 2),
    ):
        np.testing.assert_array_equal(act(load("alice/planner", **options)), act(make_planner(seed)))
    half = load("alice/planner", revision=first.revision, dtype=torch.bfloat16)
    assert half.denoiser.dtype == torch.bfloat16
    assert torch.equal(half.normalizer.observation_shift, make_planner(0).normalizer.observation_shift)
    with pytest.raises(OSError, match="`alice/planner` at nowhere cannot be read: there is no such revision"):
        load("alice/planner", revision="nowhere")


def test_the_second_time_it_loads_offline(
    hub: Any, make_planner: Callable[..., Any], act: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_planner().push_to_hub("alice/planner")
    load_pipeline("alice/planner")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    served = hub.requests.total()
    np.testing.assert_array_equal(act(load_pipeline("alice/planner")), act(make_planner()))
    assert hub.requests.total() == served


@pytest.mark.parametrize("name", ["denoiser/diffusion_pytorch_model.safetensors", "denoiser/config.json"])
def test_a_damaged_copy_of_a_pipeline_is_downloaded_once_more(
    name: str, hub: Any, make_planner: Callable[..., Any], act: Callable[..., Any]
) -> None:
    """Also if nothing but its checksum tells: a digit of a configuration, a bit of a weight."""
    commit = make_planner().push_to_hub("alice/planner").revision
    load_pipeline("alice/planner")
    copy = Path(hf_hub_download("alice/planner", name, revision=commit)).resolve()
    good = copy.read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1]) if name.endswith("safetensors") else good.replace(b": 8", b": 9")
    assert bad != good
    copy.write_bytes(bad)
    np.testing.assert_array_equal(act(load_pipeline("alice/planner")), act(make_planner()))
    assert copy.read_bytes() == good
    hub.files("alice/planner")[name] = bad
    copy.write_bytes(bad)
    with pytest.raises(CheckpointError, match=f"{name} is not the file that the manifest lists.*second download"):
        load_pipeline("alice/planner")


def test_no_code_of_the_repo_is_downloaded_or_run(
    hub: Any, make_planner: Callable[..., Any], act: Callable[..., Any], tmp_path: Path
) -> None:
    make_planner().push_to_hub("alice/planner")
    hub.files("alice/planner")  # now every code file is replaced by one that tells on itself
    for name in [name for name in hub.files("alice/planner") if name.endswith(".py")]:
        hub.files("alice/planner")[name] = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    np.testing.assert_array_equal(act(load_pipeline("alice/planner")), act(make_planner()))
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_the_class_that_loads_must_be_the_one_that_was_saved(hub: Any, make_planner: Callable[..., Any]) -> None:
    make_planner().push_to_hub("alice/planner")
    with pytest.raises(ValueError, match="holds a DiffuserPlannerPipeline, not a DiffusionPolicyPipeline"):
        DiffusionPolicyPipeline.from_pretrained("alice/planner")


@pytest.mark.parametrize("controller", ["planner", "policy"])
def test_loaded_weights_lie_where_kernels_round_alike(
    controller: str, make_planner: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights that stay in the mapped file lie at multiples of 8 bytes; torch's own memory is at multiples of 64."""
    pipeline = make_planner()
    if controller == "policy":
        parts = {name: pipeline.components[name] for name in ("scheduler", "normalizer", "critic")}
        pipeline = DiffusionPolicyPipeline(DiffusionTransformer1D(1, 3, dim=8, num_heads=2, depth=1), **parts)
    pipeline.save_pretrained(tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors"
    assert any(tensor.data_ptr() % 64 for tensor in load_file(path).values())
    components = load_pipeline(tmp_path / "pipeline").components.values()
    modules = [component for component in components if isinstance(component, torch.nn.Module)]
    assert all(t.data_ptr() % 64 == 0 for module in modules for t in (*module.parameters(), *module.buffers()))


PLAIN = """
import sys
import numpy as np
sys.modules["dmc_hub"] = None  # as if it were not installed
from diffusers import DiffusionPipeline
first, second, out = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(first)
except ValueError as error:
    assert "contains custom code" in str(error) and "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded without trust")
pipelines = [DiffusionPipeline.from_pretrained(name, trust_remote_code=True) for name in (first, second)]
observations = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
plans = [p(observations, num_candidates=4, generator=0).trajectories for p in pipelines]
assert [type(p).__module__.split(".")[0] for p in pipelines] == ["diffusers_modules"] * 2
modules = [c for p in pipelines for c in p.components.values() if hasattr(c, "parameters")]
assert all(t.data_ptr() % 64 == 0 for m in modules for t in (*m.parameters(), *m.buffers())), "kernels round by this"
np.save(out, np.stack(plans))
"""


def test_plain_diffusers_acts_alike_where_dmc_hub_is_not_installed(
    hub: Any, make_planner: Callable[..., Any], act: Callable[..., Any], shell: Callable[..., str], tmp_path: Path
) -> None:
    """Two repos in one process: an exploding variance first, whose scheduler has a branch of its own."""
    options = {"schedule": "variance_exploding", "prediction_type": "v_prediction", "kernel": "ancestral"}
    make_planner(0, **options).push_to_hub("alice/first")
    make_planner(1).push_to_hub("alice/second")
    shell(PLAIN, "alice/first", "alice/second", str(tmp_path / "plans.npy"), PYTHONPATH="")
    expected = [act(make_planner(0, **options)), act(make_planner(1))]
    np.testing.assert_array_equal(np.load(tmp_path / "plans.npy"), np.stack(expected))


def test_peft_and_diffusers_read_the_adapter(
    hub: Any, make_planner: Callable[..., Any], adapt: Callable[..., Any], tmp_path: Path
) -> None:
    planner = make_planner()
    planner.push_to_hub("alice/planner")
    adapt(planner).push_lora_to_hub("alice/lora")
    planner.save_lora_weights(tmp_path / "local")
    expected = load_file(tmp_path / "local" / "adapter_model.safetensors")
    got = peft.load_peft_weights(snapshot_download("alice/lora"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    sample = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = planner.denoiser(sample, 3).sample
    model = peft.PeftModel.from_pretrained(make_planner().denoiser, "alice/lora")
    assert torch.equal(model(sample, 3).sample, wanted)
    assert model.peft_config["default"].base_model_name_or_path == "alice/planner"
    bare = make_planner().denoiser
    weights = Path(hf_hub_download("alice/lora", "pytorch_lora_weights.safetensors"))
    bare.load_lora_adapter(str(weights.parent), prefix="denoiser", use_safetensors=True, weight_name=weights.name)
    assert torch.equal(bare(sample, 3).sample, wanted)


def test_an_adapter_of_another_base_is_refused_with_both_names(
    hub: Any, make_planner: Callable[..., Any], adapt: Callable[..., Any]
) -> None:
    first = make_planner(0)
    first.push_to_hub("alice/first")
    adapt(first).push_lora_to_hub("alice/first-lora")
    make_planner(1).push_to_hub("alice/second")
    second = load_pipeline("alice/second")
    ours, theirs = second.base_fingerprint()[:12], first.base_fingerprint()[:12]
    with pytest.raises(ValueError, match="was trained on another base") as error:
        second.load_lora_weights("alice/first-lora")
    assert f"on `alice/first` with the fingerprint {theirs}; this pipeline is `alice/second`" in str(error.value)
    assert f"with the fingerprint {ours}" in str(error.value)
    assert second.lora_names == []
