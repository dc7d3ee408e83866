"""The benchmarks: that they count and read off what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dmc_hub.benchmarks import prompts, vision
from dmc_hub.benchmarks.alignment import SETTINGS, ForwardCounter, forwards_to
from dmc_hub.benchmarks.rewards import REPEATS, reward_cost

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


def test_the_benchmarks_are_listed() -> None:
    command = [sys.executable, "scripts/benchmark.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "evaluations to 90 % of the best gain" in " ".join(shown.stdout.decode().split())


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


def test_frames_per_second_are_of_the_median_pass_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[float] = []

    def timed(run: Any, device: str) -> float:
        run()
        passes.append(len(passes))
        return [100.0, 1.0, 2.0, 9.0][(len(passes) - 1) // 5]  # five kinds take turns

    monkeypatch.setattr(vision, "_timed", timed)
    result = vision.frames_per_second(batch_size=4, image_size=40, crop=32, repetitions=3)
    assert len(passes) == 20
    assert len(result["frames_per_second"]) == 5
    assert set(result["frames_per_second"].values()) == {2.0}
    assert result["share_of_floor"] == {"forward": 1.0, "forward and backward": 1.0}


def test_the_cost_of_rewards_is_of_as_many_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def forward(self: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.rand(len(x), 1, 1, 1)

    monkeypatch.setattr(torch.nn.Sequential, "forward", forward)
    found = reward_cost(3, seed=0)
    assert found["count"] == 3
    assert set(found["joint"]) == {"fixed", "min_norm"}
    assert calls == [128] * (3 * REPEATS * 3)  # alone, and with each weighting


def test_each_prompt_is_streamed_and_memory_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "BATCH", 16)
    drawn: list[str] = []
    encode = prompts.OneOfEach.prompt_condition

    def noted(policy: Any, texts: list[str], *rest: Any) -> Any:
        drawn.extend(texts)
        return encode(policy, texts, *rest)

    monkeypatch.setattr(prompts.OneOfEach, "prompt_condition", noted)
    found = prompts.stream_prompts(tmp_path, count=160, seed=0)
    assert len(drawn) == len(set(drawn)) == 160
    assert len(found["memory"]) == 9
    assert found["growth"] == pytest.approx(found["memory"][-1] / found["memory"][0] - 1)
