"""A run goes to the Hub from the command line, and another process acts as it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from huggingface_hub import ModelCard

from dmc_hub.cli import main
from dmc_hub.hub import load_pipeline

ACT = """
import sys
import gymnasium
from dmc_hub.hub import load_pipeline
pipeline = load_pipeline(sys.argv[1])
pipeline.load_lora_weights(sys.argv[2])
observation, _ = gymnasium.make("dmc_hub/Nav1D-v0").reset(seed=0)
print(pipeline(observation, num_candidates=16, generator=0).action.tobytes().hex())
"""


def test_align_pushes_and_another_machine_acts_alike(
    hub: Any, shell: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small = ["--training-scale", "0.001", "--max-passes", "1", "--num-evaluation-episodes", "8"]
    small += ["--num-validation-episodes", "8", "--methods", "sft", "--validations-per-stage", "1"]
    command = ["align", "--task", "nav1d-full", "--controller", "policy", "--output-dir", str(run), *small]
    assert main([*command, "--push-to-hub", "alice/nav1d"]) == 0
    printed = capsys.readouterr().out
    assert "pushed alice/nav1d at " in printed
    assert "pushed alice/nav1d-lora at " in printed
    policy = load_pipeline(run / "pipeline")
    policy.load_lora_weights(run / "adapter")
    observation, _ = gymnasium.make("dmc_hub/Nav1D-v0").reset(seed=0)
    action = policy(observation, num_candidates=16, generator=0).action
    got = shell(ACT, "alice/nav1d", "alice/nav1d-lora")
    assert got.split()[-1] == action.tobytes().hex()

    report = json.loads((run / "report.json").read_text())
    assert json.loads(hub.files("alice/nav1d-lora")["report.json"]) == report
    data = ModelCard.load("alice/nav1d-lora").data
    greedy = [r for r in data.eval_results if r.metric_name == f"mean return, greedy of {report['num_candidates']}"]
    assert [(r.metric_value, r.metric_args["std"], r.metric_args["episodes"]) for r in greedy] == [
        (report["return_after"], report["std_after"], 8)
    ]
    assert greedy[0].metric_args["seeds"] == [report["seeds"][0], report["seeds"][-1]]
    foundation = ModelCard.load("alice/nav1d").data
    assert report["return_before"] in [r.metric_value for r in foundation.eval_results]
    for repo_id in ("alice/nav1d", "alice/nav1d-lora"):
        texts = [content for name, content in hub.files(repo_id).items() if name.endswith((".json", ".md"))]
        assert not any(str(tmp_path).encode() in text for text in texts)
        assert b"learning_curve.png" in hub.files(repo_id)["README.md"]
        assert hub.files(repo_id)["learning_curve.png"].startswith(b"\x89PNG")
    index = json.loads(hub.files("alice/nav1d")["model_index.json"])
    assert index["_dmc_hub"]["task"]["action_space"] == {
        "shape": [1],
        "dtype": "float32",
        "low": [-1.0],
        "high": [1.0],
    }

    commits = {name: len(repo.commits) for name, repo in hub.repos.items()}
    assert main(["push", "--folder", str(run), "--repo-id", "alice/nav1d"]) == 0
    assert {name: len(repo.commits) for name, repo in hub.repos.items()} == commits  # nothing had changed
    check_pull_card_and_info(run, tmp_path, capsys)


def check_pull_card_and_info(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    pulled = tmp_path / "pulled"
    assert main(["pull", "--repo-id", "alice/nav1d", "--output-dir", str(pulled)]) == 0
    assert "files, all as listed" in capsys.readouterr().out
    for path in (run / "pipeline").rglob("*.safetensors"):
        assert (pulled / path.relative_to(run / "pipeline")).read_bytes() == path.read_bytes()
    assert main(["pull", "--repo-id", "alice/nav1d", "--output-dir", str(pulled)]) == 2
    assert "is there already: choose another folder" in capsys.readouterr().err
    for source in ("alice/nav1d", str(pulled)):
        assert main(["info", "--source", source]) == 0
        shown = capsys.readouterr().out
        for line in ("kind: pipeline", "class: DiffusionPolicyPipeline", "task: nav1d-full", "safe to load: yes"):
            assert line in shown, (line, shown)
    assert main(["info", "--source", "alice/nav1d-lora"]) == 0
    shown = capsys.readouterr().out
    assert "base: alice/nav1d\n" in shown
    assert "mean return, one sample: " in shown
    assert main(["card", "--run", str(run), "--kind", "pipeline", "--repo-id", "a/b"]) == 0
    assert 'from_pretrained("a/b")' in capsys.readouterr().out
    assert main(["card", "--run", str(run), "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == (run / "README.md").read_text()
