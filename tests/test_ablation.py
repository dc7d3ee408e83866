"""The comparison of alignment methods: what each variant runs, and what a row holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub import ablation
from dmc_hub.ablation import ablate_alignment, variant_methods
from dmc_hub.presets import PRESETS
from dmc_hub.report import learning_curve


def test_every_variant_runs_what_its_name_says() -> None:
    preset = PRESETS["nav1d-full"]("policy", "ddpm")
    methods = {variant: variant_methods(variant, preset) for variant in ablation.VARIANTS}
    assert methods["rl"] == ("reward_gradient",)
    assert methods["rl+sft"] == ("reward_gradient", "sft")
    assert methods["sequence"] == methods["sequence+cascade"] == ("reward_gradient", "dpo", "sft")
    assert methods["joint"] == ("joint",)


def test_rows_hold_the_means_of_the_runs_and_a_second_call_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[dict[str, Any]]:
        return ablate_alignment(
            tmp_path,
            controllers=["policy"],
            variants=["sequence", "sequence+cascade"],
            seeds=[3],
            training_scale=0.005,
            num_episodes=8,
        )

    sequence, cascade = run()
    report = json.loads((tmp_path / "policy-sequence-3" / "report.json").read_text())
    assert sequence["return_after"] == pytest.approx(np.mean(report["evaluations"][0]["returns_after"]))
    assert cascade["return_after"] == pytest.approx(np.mean(report["evaluations"][3]["returns_after"]))
    assert cascade["best_of_many_after"] == pytest.approx(np.mean(report["evaluations"][4]["returns_after"]))
    assert sequence["return_before"] == cascade["return_before"]
    assert json.loads((tmp_path / "nav1d-ablation.json").read_text())["rows"][0]["variant"] == "sequence"
    assert (tmp_path / "nav1d-ablation.md").read_text().count("| policy |") == 2
    assert (tmp_path / "nav1d-ablation.png").is_file()
    monkeypatch.setattr(ablation, "align_task", lambda *_, **__: pytest.fail("a finished run was repeated"))
    assert [row["return_after"] for row in run()] == [sequence["return_after"], cascade["return_after"]]


def test_the_learning_curve_counts_the_steps_of_all_stages() -> None:
    stages = [
        {"return_mean": 2.0, "num_steps": 0, "validations": []},
        {"num_steps": 20, "validations": [{"step": 10, "return_mean": 3.0}, {"step": 20, "return_mean": 4.0}]},
        {"num_steps": 5, "validations": [{"step": 5, "return_mean": 1.0}]},
    ]
    assert learning_curve(stages) == [(0, 2.0), (10, 3.0), (20, 4.0), (25, 1.0)]


@pytest.mark.parametrize("wrong", [{"controllers": ["dog"]}, {"variants": []}])
def test_unknown_names_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be among"):
        ablate_alignment(tmp_path, seeds=[0], training_scale=0.01, num_episodes=1, **wrong)
