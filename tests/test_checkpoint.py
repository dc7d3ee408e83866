"""A folder is complete and verifiable, or it is not there."""

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dmc_hub import checkpoint
from dmc_hub.checkpoint import CheckpointError


def write(folder: Path, step: int = 0, value: float = 1.0) -> Path:
    with checkpoint.write_folder_atomically(folder, {"step": step}) as stage:
        (stage / "denoiser").mkdir()
        checkpoint.save_tensors(stage / "denoiser" / "weights.safetensors", {"w": torch.full((8,), value)})
        checkpoint.save_json(stage / "state.json", {"step": step, "loss": 0.1 + 0.2})
    return folder


def weights(folder: Path) -> torch.Tensor:
    return checkpoint.load_tensors(folder / "denoiser" / "weights.safetensors")["w"]


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    manifest = checkpoint.verify(write(tmp_path / "checkpoint-3", step=3))
    assert manifest.metadata == {"step": 3}
    assert set(manifest.files) == {"denoiser/weights.safetensors", "state.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]  # no stage is left


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with checkpoint.write_folder_atomically(tmp_path / "model") as stage:
            (stage / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_and_an_exception_keeps_the_old(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", value=1.0)
    write(folder, value=2.0)
    assert (weights(folder) == 2.0).all()
    with pytest.raises(RuntimeError), checkpoint.write_folder_atomically(folder):
        raise RuntimeError
    checkpoint.verify(folder)
    assert (weights(folder) == 2.0).all()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint.verify(folder)
        path.write_bytes(content)
    checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["denoiser/weights.safetensors", "state.json", checkpoint.MANIFEST_NAME])
def test_missing_and_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "checkpoint-1")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    wanted = "not a valid manifest" if name == checkpoint.MANIFEST_NAME else "truncated"
    with pytest.raises(CheckpointError, match=f"{Path(name).name}.*{wanted}"):
        checkpoint.verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(name).name}.*is missing"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 1}', '{"format": 99}', "[" * 100_000, "\x00"])
def test_garbage_manifests_are_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "checkpoint-1")
    (folder / checkpoint.MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoint.verify(folder)


def test_files_outside_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")
    manifest = checkpoint.verify(folder)
    files = {"../secret": next(iter(manifest.files.values()))}
    forged = checkpoint.Manifest(manifest.library_version, files, {})
    (folder / checkpoint.MANIFEST_NAME).write_text(checkpoint.manifest_text(forged))
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint.verify(folder)


def test_latest_skips_corrupt_ones_with_a_warning(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        write(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-100.*state\.json.*missing"):
        assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_prune_deletes_only_after_the_newest_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-3" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.prune(tmp_path, keep=1)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    write(tmp_path / "checkpoint-3", 3)
    checkpoint.prune(tmp_path, keep=1, protect=[tmp_path / "checkpoint-1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    with pytest.raises(ValueError, match="`keep` must be at least 1"):
        checkpoint.prune(tmp_path, keep=0)


# Each dies inside `os.rename` number `sys.argv[2]`, that is before it takes effect.
_DIE_IN_RENAME = """
import os, sys
from pathlib import Path
from dmc_hub import checkpoint
rename, left = os.rename, [int(sys.argv[2])]
def dying(*args):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    rename(*args)
os.rename = dying
with checkpoint.write_folder_atomically(sys.argv[1]) as stage:
    (stage / "new").write_text("new")
"""


@pytest.mark.parametrize("renames_before_death", [0, 1, 2])
def test_death_while_replacing_loses_nothing(tmp_path: Path, renames_before_death: int) -> None:
    folder = write(tmp_path / "checkpoint-1")
    arguments = [sys.executable, "-c", _DIE_IN_RENAME, str(folder), str(renames_before_death)]
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    status = subprocess.run(arguments, env=environment, check=False).returncode
    assert status == (9 if renames_before_death < 2 else 0)
    assert checkpoint.latest_checkpoint(tmp_path) == folder
    assert (folder / "new").exists() == (renames_before_death == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]  # stages of the dead are gone


def test_stages_of_the_living_are_kept(tmp_path: Path) -> None:
    stage = checkpoint.open_stage(tmp_path / "a")
    checkpoint.remove_stale(tmp_path)
    assert stage.is_dir()
    checkpoint.discard_stage(stage)
    assert not stage.exists()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Adafactor", "NAdam"])
def test_optimizer_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias]}]
        return model, getattr(torch.optim, name)(groups, lr=1e-2, **options)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    for seed in range(3):
        step(model, optimizer, seed)
    checkpoint.save_optimizer(optimizer, tmp_path)
    copy, resumed = build()
    copy.load_state_dict(model.state_dict())
    checkpoint.load_optimizer(resumed, tmp_path)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(copy, resumed, seed)
    assert torch.equal(model.weight, copy.weight)
    assert torch.equal(model.bias, copy.bias)


def test_optimizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    checkpoint.save_optimizer(torch.optim.Adam([parameter]), tmp_path)
    with pytest.raises(CheckpointError, match="state of a Adam, not of a SGD"):
        checkpoint.load_optimizer(torch.optim.SGD([parameter]), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds \[1\] optimised parameters per group, the model has \[2\]"):
        checkpoint.load_optimizer(torch.optim.Adam([parameter, torch.nn.Parameter(torch.zeros(1))]), tmp_path)


def test_random_states_round_trip(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        numpy_value = float(np.random.standard_normal())  # noqa: NPY002 - the global generator is meant
        return random.random(), random.gauss(0, 1), numpy_value, torch.randn(()).item()

    draw()  # leaves a cached second Gaussian in python's and numpy's generators
    checkpoint.save_rng_state(tmp_path / "rng.safetensors")
    expected = [draw() for _ in range(3)]
    checkpoint.load_rng_state(tmp_path / "rng.safetensors")
    assert [draw() for _ in range(3)] == expected


def test_incomplete_random_state_is_refused(tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "rng.safetensors", {"torch": torch.get_rng_state()})
    with pytest.raises(CheckpointError, match="lacks the generator state of numpy, python"):
        checkpoint.load_rng_state(tmp_path / "rng.safetensors")


def test_views_and_shared_tensors_are_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    checkpoint.save_tensors(tmp_path / "t.safetensors", {"a": base, "b": base.T, "c": base[0]})
    loaded = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["b"], base.T)
    assert torch.equal(loaded["c"], base[0])


def test_json_keeps_every_bit_of_a_float(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 1 / 3]
    checkpoint.save_json(tmp_path / "x.json", values)
    assert checkpoint.load_json(tmp_path / "x.json") == values
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json.*not JSON"):
        checkpoint.load_json(tmp_path / "x.json")


def test_no_pickle_is_read_or_written() -> None:
    source = Path(checkpoint.__file__).read_text()
    assert "torch.load(" not in source
    assert "torch.save(" not in source
    assert "import pickle" not in source


def test_verifying_warns_of_nothing(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.latest_checkpoint(tmp_path) is not None
    text = (tmp_path / "checkpoint-1" / checkpoint.MANIFEST_NAME).read_text()
    assert json.loads(text)["format"] == checkpoint.FORMAT_VERSION


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_weights_are_compared_while_the_block_runs_and_all_else_before(tmp_path: Path) -> None:
    folder, entered = write(tmp_path / "checkpoint-1"), []
    flip(folder / "denoiser" / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"), checkpoint.verifying(folder):
        entered.append("weights")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors") as caught, checkpoint.verifying(folder):
        raise RuntimeError("what broken weights made of it")
    assert "what broken weights" in str(caught.value.__context__)
    with checkpoint.verifying(folder, lambda name: name == "state.json") as manifest:
        entered.append("unwanted")
    assert set(manifest.files) == {"denoiser/weights.safetensors", "state.json"}
    flip(folder / "state.json")
    with pytest.raises(CheckpointError), checkpoint.verifying(folder):
        entered.append("state")
    assert entered == ["weights", "unwanted"]


def test_an_error_while_whole_files_load_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), checkpoint.verifying(write(tmp_path / "checkpoint-1")):
        raise RuntimeError("mine")
