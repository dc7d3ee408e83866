"""A whole run at a small scale: what it leaves behind, and that it can be interrupted and continued."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from dmc_hub import checkpoint
from dmc_hub.cli import main
from dmc_hub.hub import load_pipeline
from dmc_hub.output_folder import alone_in
from dmc_hub.report import _label
from dmc_hub.tasks import get_task

SMALL = ["--training-scale", "0.01", "--max-passes", "1", "--num-evaluation-episodes", "8"]
SMALL += ["--num-validation-episodes", "8"]


def align(controller: str, folder: Path, *extra: str) -> int:
    arguments = ["--task", "nav1d-full", "--controller", controller, "--output-dir", str(folder)]
    return main(["align", *arguments, *SMALL, *extra])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert align("policy", folder) == 0
    return folder


def test_a_run_leaves_a_report_plots_a_card_and_the_parts(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    wanted = "task controller return_before return_after std_before std_after return_optimal coherency_before"
    for key in f"{wanted} coherency_after seeds wall_seconds stages best_of_n_control".split():
        assert key in report, key
    assert [row["name"] for row in report["stages"]] == ["foundation", "reward_gradient", "dpo", "sft"]
    assert report["return_optimal"] == pytest.approx(7.3788, abs=1e-3)
    assert set(report["seeds"]).isdisjoint(report["validation_seeds"])
    assert report["return_after"] == pytest.approx(np.mean(report["evaluations"][1]["returns_after"]))
    acting = report["acting"]
    assert [(row["action_selection"], row["num_candidates"]) for row in acting["validated"]] == [
        ("greedy", 1),
        ("greedy", 8),
        ("expectation", 8),
    ]
    best = max(acting["validated"], key=lambda row: row["return_mean"])
    assert best == {name: acting[name] for name in ("action_selection", "num_candidates", "return_mean")}
    assert f"num_candidates={best['num_candidates']}" in (run / "README.md").read_text()
    for name in ("learning_curve.png", "diversity.png", "trajectories.png", "returns.png", "critic.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        assert name in (run / "report.md").read_text()
    critic, row = report["critic"], report["evaluations"][1]
    assert critic["num_steps"] == 4096
    assert (critic["discount"], critic["expectile"], critic["bootstrapped_weight"]) == (1.0, 0.99, 0.0)
    assert -1 <= critic["q_spearman"] <= 1
    np.testing.assert_allclose(np.array(row["returns_after"]) / report["return_optimal"], row["scores_after"])
    card = (run / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"{report['return_after']:.2f}" in card


def test_ten_lines_of_python_act_as_the_process_that_trained(run: Path) -> None:
    pipeline = load_pipeline(run / "pipeline")
    pipeline.load_lora_weights(run / "adapter")
    observation, _ = gymnasium.make("dmc_hub/Nav1D-v0").reset(seed=0)
    action = pipeline(observation, num_candidates=16, generator=0).action
    code = """
import sys, gymnasium as gym, dmc_hub
from dmc_hub import DiffusionPolicyPipeline
policy = DiffusionPolicyPipeline.from_pretrained(sys.argv[1] + "/pipeline")
policy.load_lora_weights(sys.argv[1] + "/adapter")
env = gym.make("dmc_hub/Nav1D-v0")
observation, _ = env.reset(seed=0)
print(policy(observation, num_candidates=16, generator=0).action.tobytes().hex())
"""
    printed = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == action.tobytes().hex()


def test_repeating_a_finished_run_finds_its_parts_and_the_same_figures(run: Path) -> None:
    before = json.loads((run / "report.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in (run / "pipeline").rglob("*.safetensors")}
    assert align("policy", run) == 0
    after: dict[str, Any] = json.loads((run / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert after["return_after"] == before["return_after"]
    trained = sum(row["wall_seconds"] for row in before["stages"])
    assert after["wall_seconds"] > trained  # what an earlier process did counts
    assert after["evaluations"] == before["evaluations"]


def test_a_cascade_is_trained_evaluated_and_saved_in_the_pipeline(run: Path, tmp_path: Path) -> None:
    given = ["--foundation", str(run / "pipeline"), "--methods", "joint", "--min-diversity", "0.01"]
    for _ in range(2):  # the second time, it is found
        assert align("policy", tmp_path / "run", *given, "--num-upsampling-passes", "1") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = [(row["action_selection"], row["num_upsampling_passes"]) for row in report["evaluations"]]
    assert rows == [(name, passes) for passes in (0, 1) for name in ("greedy", "greedy", "expectation")]
    plain, cascaded = report["evaluations"][0], report["evaluations"][3]
    assert cascaded["before"] == plain["before"]
    assert cascaded["after"] != plain["after"]
    assert "1 × up-sampled" in (tmp_path / "run" / "report.md").read_text()
    assert 'load_pipeline("pipeline-after")' in (tmp_path / "run" / "README.md").read_text()
    pipeline = load_pipeline(tmp_path / "run" / "pipeline-after")
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    observation, _ = gymnasium.make("dmc_hub/Nav1D-v0").reset(seed=0)
    first, second = (pipeline(observation, num_upsampling_passes=n, generator=0).action for n in (0, 1))
    assert not np.array_equal(first, second)


def test_other_settings_in_the_same_folder_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert align("policy", run, "--seed", "1") == 2
    assert "holds a run with other settings (seed was 0, is now 1)" in capsys.readouterr().err


def test_a_damaged_foundation_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = next((copy / "pipeline" / "denoiser").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert align("policy", copy) == 2
    assert weights.name in capsys.readouterr().err


def test_evaluate_and_one_stage_from_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = str(run / "pipeline")
    stage = ["--task", "nav1d-full", "--pipeline", pipeline, "--output-dir", str(tmp_path / "ddpo"), "--max-steps", "2"]
    assert main(["train-ddpo", *stage, "--per-device-train-batch-size", "16", "--disable-tqdm", "true"]) == 0
    arguments = ["--task", "nav1d-full", "--pipeline", pipeline, "--adapter", str(tmp_path / "ddpo" / "adapter")]
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--num-episodes", "4", "--output", str(tmp_path / "result.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["statistics"]["num_episodes"] == 4
    assert json.loads((tmp_path / "result.json").read_text())["statistics"] == printed["statistics"]


def test_an_unknown_task_is_answered_with_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "--task", "nav2d", "--output-dir", str(tmp_path)]) == 2
    assert "`task` 'nav2d' is unknown; known tasks: nav1d-full, nav1d-partial, nav1d-expert" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown"):
        get_task("nav2d")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--methods", "ppo", "`methods` must be a list of ddpo, reward_gradient, nft, dpo, sft, joint; got ['ppo']"),
        ("--methods=ddpo", "--sampler=ddim", "`methods` has ddpo, which needs noise in each step"),
        ("--num-candidates", "0", "`num_candidates` must be at least 1, got 0"),
        ("--max-passes", "-1", "`max_passes` must be at least 1, got -1"),
        ("--training-scale", "nan", "`training_scale` must be positive and finite, got nan"),
        ("--training-scale", "inf", "`training_scale` must be positive and finite, got inf"),
        ("--num-upsampling-passes", "-1", "`num_upsampling_passes` must be at least 0, got -1"),
        ("--min-diversity", "1.5", "`min_diversity` must lie in (0, 1], got 1.5"),
        ("--seed", "-1", "`seed` must not be negative, got -1"),
        ("--num-online-episodes", "-1", "`num_online_episodes` must not be negative, got -1"),
        ("--num-online-workers", "-1", "`num_online_workers` must not be negative, got -1"),
        ("--online-buffer-size", "0", "`online_buffer_size` must be at least 1, got 0"),
        ("--online-worker-timeout", "nan", "`online_worker_timeout` must be positive, got nan"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align("policy", tmp_path / "run", option, value) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_is_for_one_run_of_one_process_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone_in(tmp_path):
        assert align("policy", tmp_path) == 2
    assert f"`output_dir` {tmp_path} is in use by another run of this process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert align("policy", tmp_path) == 2
    assert "`align` runs in one process, not 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "settings.json").write_text("[]")
    assert align("policy", tmp_path) == 2
    assert "does not hold the settings of a run" in capsys.readouterr().err


def test_one_stage_replaces_nothing_and_continues_when_it_is_told_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-ddpo", "--task", "nav1d-full", "--pipeline", str(run / "pipeline"), "--disable-tqdm", "true"]
    command += ["--per-device-train-batch-size", "16", "--lr-scheduler-type", "constant"]
    before = (run / "adapter" / "manifest.json").read_bytes()
    assert main([*command, "--output-dir", str(run), "--max-steps", "1"]) == 2
    assert "already holds adapter/: choose another folder" in capsys.readouterr().err
    assert (run / "adapter" / "manifest.json").read_bytes() == before
    saving = ["--output-dir", str(tmp_path), "--save-strategy", "steps", "--save-steps", "1"]
    assert main([*command, *saving, "--max-steps", "1"]) == 0
    assert main([*command, *saving, "--max-steps", "2", "--resume-from-checkpoint", "true"]) == 0
    assert json.loads((tmp_path / "adapter" / "manifest.json").read_text())["metadata"]["step"] == 2


@pytest.mark.parametrize("part", ["pipeline/denoiser/diffusion_pytorch_model", "adapter/adapter_model"])
def test_changed_weights_are_not_evaluated(
    part: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of one weight: safetensors loads it without a word."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / f"{part}.safetensors"
    content = bytearray(path.read_bytes())
    content[-30] ^= 64
    path.write_bytes(content)
    folders = ["--pipeline", str(copy / "pipeline"), "--adapter", str(copy / "adapter")]
    assert main(["evaluate", "--task", "nav1d-full", "--num-episodes", "1", *folders]) == 2
    assert f"`{path}` was changed" in capsys.readouterr().err


def test_evaluate_refuses_what_it_could_not_write_or_measure(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--task", "nav1d-full", "--pipeline", str(run / "pipeline")]
    assert main([*command, "--num-episodes", "0"]) == 2
    assert "`num_episodes` must be at least 1, got 0" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "none" / "result.json")]) == 2
    assert "lies in a folder that does not exist" in capsys.readouterr().err


def test_a_pipeline_is_loaded_in_silence_or_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_pipeline(run / "pipeline")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    (tmp_path / "model_index.json").write_text('{"_class_name": ["remote", "DiffuserPlannerPipeline"]}')
    with pytest.raises(ValueError, match=r"holds a DiffuserPlannerPipeline of the repo's own remote\.py, not one"):
        load_pipeline(tmp_path)


def test_the_learning_curve_marks_what_was_rolled_back() -> None:
    rows = [{"name": "dpo", "decision": decision} for decision in ("kept", "rolled back")]
    assert [_label(row) for row in rows] == ["dpo", "(dpo)"]


def test_a_script_runs_on_two_processes_that_agree(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "train_ddpo.py"
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    arguments = ["--task", "nav1d-full", "--pipeline", str(run / "pipeline"), "--output-dir", str(tmp_path)]
    arguments += ["--max-steps", "3", "--per-device-train-batch-size", "16", "--disable-tqdm", "true"]
    result = subprocess.run(
        [sys.executable, "-m", *launch, str(script), *arguments],
        env={**_environment(), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["metadata"]["world_size"] == 2
    assert manifest["metadata"]["step"] == 3
    assert result.stderr.count("saved ") == 1


def test_a_disk_that_is_full_on_the_way_ends_the_run_unless_it_is_told_to_go_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = checkpoint.write_text

    def full(path: Path, text: str) -> None:
        if "stages" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", full)
    options = ["--foundation", str(run / "pipeline"), "--methods", "sft"]
    assert align("policy", tmp_path, *options) == 1
    assert "00-foundation` cannot be written ([Errno 28] No space left on device" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="Alignment goes on, and writes no more stages"):
        assert align("policy", tmp_path, *options, "--on-save-error", "warn") == 0
    assert json.loads((tmp_path / "report.json").read_text())["stages"][1]["name"] == "sft"
    assert load_pipeline(tmp_path / "pipeline").load_lora_weights(tmp_path / "adapter") is None


def test_an_online_run_collects_between_its_stages(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two worker processes; the critic that it leaves is the one that its last evaluation chose with."""
    options = ["--foundation", str(run / "pipeline"), "--methods", "sft", "sft", "--num-online-episodes", "6"]
    options += ["--online-buffer-size", "40", "--num-online-workers", "2", "--online-critic-steps", "500"]
    assert align("policy", tmp_path, *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    [collection] = report["collections"]
    assert (collection["stage"], collection["num_episodes"], collection["num_buffer_steps"]) == (2, 6, 40)
    log = [json.loads(line) for line in (tmp_path / "alignment_log.jsonl").read_text().splitlines()]
    assert [row["name"] for row in log] == ["foundation", "sft", "online", "sft", "end"]
    assert "| 2 | 6 | 0 |" in (tmp_path / "report.md").read_text()
    assert 'load_pipeline("pipeline-after")' in (tmp_path / "README.md").read_text()
    assert json.loads((run / "report.json").read_text())["collections"] == []
    folders = ["--pipeline", str(tmp_path / "pipeline-after"), "--adapter", str(tmp_path / "adapter")]
    capsys.readouterr()
    evaluation = ["--num-episodes", "8", "--num-candidates", "8", "--output", str(tmp_path / "e.json")]
    assert main(["evaluate", "--task", "nav1d-full", *folders, *evaluation]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["returns"] == report["evaluations"][1]["returns_after"]
    assert align("policy", tmp_path, *options, "--online-buffer-size", "41") == 2
    assert "holds a run with other settings (online was {'num_episodes': 6" in capsys.readouterr().err


def _environment() -> dict[str, str]:
    import os

    root = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
