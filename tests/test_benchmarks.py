"""The benchmarks: that they count and read off what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmc_hub.benchmarks.alignment import SETTINGS, ForwardCounter, forwards_to

ROOT = Path(__file__).parents[1]


def test_forwards_are_counted_in_samples_and_not_while_paused() -> None:
    network = torch.nn.Linear(2, 2)
    counter = ForwardCounter(network)
    network(torch.zeros(3, 2))
    with counter.paused():
        network(torch.zeros(5, 2))
    torch.func.functional_call(network, dict(network.named_parameters()), (torch.zeros(4, 2),))
    assert counter.count == 7


def test_the_mark_is_read_off_between_validations() -> None:
    curve = [{"forwards": f, "return_mean": r} for f, r in ((0.0, 2.0), (100.0, 4.0), (200.0, 3.0), (300.0, 8.0))]
    assert forwards_to(3.0, curve) == 50.0
    assert forwards_to(6.0, curve) == 260.0
    assert forwards_to(8.5, curve) is None


def test_the_alignment_benchmark_writes_its_figures(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    command = [sys.executable, "scripts/benchmark.py", "alignment", "--controller", "policy", "--scale", "0.01"]
    foundation = make_foundation(tmp_path)
    subprocess.run([*command, "--foundation", foundation, "--output", str(output)], cwd=ROOT, check=True)
    result = json.loads(output.read_text())
    assert result["forwards_to_mark"].keys() == SETTINGS.keys()
    assert result["default"] == "QV-PG"
    # 4 steps of 256 samples, each: 10 denoising steps, all but the last of which have a density and are trained
    assert result["curves"]["plain DDPO"][-1]["forwards"] == 4 * 256 * (10 + 9)


def make_foundation(folder: Path) -> str:
    from dmc_hub.data import Episodes
    from dmc_hub.presets import PRESETS
    from dmc_hub.tasks import get_task

    episodes = Episodes.from_dataset(get_task("nav1d-full").dataset(0))
    PRESETS["nav1d-full"]("policy", "ddpm").build_pipeline(episodes, 0).save_pretrained(folder / "foundation")
    return str(folder / "foundation")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_differ_from_the_preset_by_known_options(name: str) -> None:
    from dmc_hub.trainers.alignment import METHODS

    method, changes = SETTINGS[name]
    METHODS[method][1](output_dir=None, **changes)
