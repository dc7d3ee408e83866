"""`dmc-hub images`: alignment of a saved pipeline from the command line, alone and by `accelerate launch`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from dmc_hub import checkpoint
from dmc_hub.cli import main
from dmc_hub.image_commands import load_rewards
from dmc_hub.prompt_files import stream_of_rows
from dmc_hub.trainers.ddpo import DDPOConfig

REPO = Path(__file__).parents[2]
REWARDS = """
def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))

def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))
"""
SMALL = ["--max-steps", "2", "--num-inference-steps", "2", "--per-device-train-batch-size", "4", "--group-size", "2"]
SMALL += ["--lora-rank", "2", "--disable-tqdm", "true", "--use-cpu", "true"]


@pytest.fixture
def inputs(make_pipeline: Callable[[str], Any], tmp_path: Path) -> list[str]:
    make_pipeline("sd_v").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\na tree\n")
    (tmp_path / "mine.py").write_text(REWARDS)
    rewards = [f"{tmp_path / 'mine.py'}:bright", f"{tmp_path / 'mine.py'}:red"]
    return ["--model", f"{tmp_path / 'base'}", "--prompts", f"{tmp_path / 'prompts.txt'}", "--rewards", *rewards]


def test_a_pipeline_is_aligned_and_plain_diffusers_loads_the_adapter(
    inputs: list[str], tmp_path: Path, make_pipeline: Callable[[str], Any]
) -> None:
    folder = ["--output-dir", str(tmp_path / "run")]
    options = ["--num-conditions", "2", "--dtype", "bfloat16", "--learning-rate", "0.1"]
    assert main(["images", "train-nft", *inputs, *SMALL, *options, *folder]) == 0
    weights = checkpoint.load_tensors(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name or ".up." in name)
    make_pipeline("sd_v").load_lora_weights(tmp_path / "run" / "adapter")
    assert main(["images", "train-nft", *inputs, *SMALL, *folder]) == 2  # it holds an adapter already


def test_two_processes_are_launched_from_the_configuration(inputs: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(REPO / "scripts/accelerate/cpu.yaml"), str(REPO / "scripts/train_images.py")]
    command += ["train-ddpo", *inputs, *SMALL, "--shard-optimizer", "--output-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    subprocess.run(command, check=True, env=environment, timeout=300)
    manifest = checkpoint.read_manifest(tmp_path / "run" / "adapter")
    assert manifest.metadata["step"] == 2


@pytest.mark.parametrize(("name", "machines", "processes"), [("multi_gpu", 1, 8), ("multi_node", 16, 128)])
def test_the_configurations_are_what_accelerate_reads(name: str, machines: int, processes: int) -> None:
    config: Any = load_config_from_file(str(REPO / f"scripts/accelerate/{name}.yaml"))
    assert config.distributed_type.value == "MULTI_GPU"
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, processes, "bf16")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_by_the_launcher_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="with `shard_optimizer` if memory is short"):
        DDPOConfig(max_steps=1)


def test_rewards_and_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("number = 3\n\ndef good(*_):\n    pass\n")
    assert set(load_rewards([f"{mine}:good", "http://127.0.0.1:9/score"])) == {"good", "http://127.0.0.1:9/score"}
    for sources, message in (
        ([], "`rewards` is empty"),
        ([f"{mine}:number"], "must be a function, got int"),
        ([f"{mine}:good", f"{mine}:good"], "two that are called 'good'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rewards(sources)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_rewards([f"{tmp_path / 'other.py'}:good"])
    with pytest.raises(FileNotFoundError, match="There is no file"):
        stream_of_rows(str(tmp_path / "no.txt"), seed=0)
    with pytest.raises(ValueError, match=r"must end in \.txt, \.jsonl, \.parquet"):
        stream_of_rows(str(mine), seed=0)


def test_the_guide_runs_when_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "text_to_image.md").read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "text_to_image.md", "exec"), names)
    assert names["image"].size == (8, 8)
    assert names["trainer"].state.global_step == 4
