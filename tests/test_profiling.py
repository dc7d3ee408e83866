"""Traces of a few steps, and what they say was most expensive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmc_hub.cli import main
from dmc_hub.profiling import NothingTracedWarning, end_step, profile_steps


def multiply(times: int, path: str) -> None:
    """One step: so many products."""
    a = torch.full((200, 200), 0.1)
    for _ in range(times):
        a = a @ a
    end_step(path)


def products(folder: Path, path: str) -> int:
    """In the trace of a path."""
    events = json.loads((folder / f"{path}.json").read_text())["traceEvents"]
    return sum(event["name"] == "aten::mm" for event in events)


def test_a_window_of_each_path_is_traced(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    with profile_steps(folder, num_skipped=2, num_steps=3):
        for step in range(9):
            multiply(10 + step, "train")  # steps 2, 3 and 4 are traced
        for _ in range(4):
            multiply(1, "evaluate")  # steps 2 and 3, then the block ends
    multiply(100, "train")
    tables = json.loads((folder / "most_expensive.json").read_text())
    assert {path: table["steps"] for path, table in tables.items()} == {"train": 3, "evaluate": 2}
    assert products(folder, "train") == 12 + 13 + 14
    assert products(folder, "evaluate") == 2
    [row] = [row for row in tables["train"]["operations"] if row["name"] == "aten::mm"]
    assert row["calls"] == 39
    text = (folder / "most_expensive.md").read_text()
    assert text.startswith("train, 3 steps\n\n| operation | calls | share of the time |\n")
    assert "\nevaluate, 2 steps\n" in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "evaluate.json",
        "most_expensive.json",
        "most_expensive.md",
        "train.json",
    ]


def test_a_window_that_another_path_interrupts_ends_there(tmp_path: Path) -> None:
    with profile_steps(tmp_path / "profile", num_skipped=1, num_steps=9):
        for path in ("a", "b", "a", "a", "a", "b"):
            multiply(1, path)
    tables = json.loads((tmp_path / "profile/most_expensive.json").read_text())
    assert {path: table["steps"] for path, table in tables.items()} == {"a": 2}


def test_too_few_steps_leave_no_trace_and_say_so(tmp_path: Path) -> None:
    def run() -> None:
        with profile_steps(tmp_path / "profile"):
            for _ in range(3):
                multiply(1, "train")

    with pytest.warns(NothingTracedWarning, match="no part of the run has more than 3 steps"):
        run()
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_folder_that_is_there_is_refused_and_none_traces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"`profile` .* exists already"), profile_steps(tmp_path):
        pass
    with profile_steps(None):
        multiply(1, "train")
    monkeypatch.setenv("RANK", "1")
    with profile_steps(tmp_path / "profile"):
        multiply(1, "train")
    assert not (tmp_path / "profile").exists()


def test_the_commands_leave_traces(tmp_path: Path) -> None:
    common = ["--task", "nav1d-full", "--profile"]
    training = ["--output-dir", str(tmp_path / "run"), "--max-steps", "6", "--per-device-train-batch-size", "4"]
    command = ["train-denoising", *common, str(tmp_path / "training"), *training, "--controller", "policy"]
    assert main([*command, "--use-cpu", "true", "--disable-tqdm", "true"]) == 0
    tables = json.loads((tmp_path / "training/most_expensive.json").read_text())
    assert tables["DenoisingTrainer"]["steps"] == 3
    assert any("AdamW" in row["name"] or "addmm" in row["name"] for row in tables["DenoisingTrainer"]["operations"])
    evaluation = ["--pipeline", str(tmp_path / "run/pipeline"), "--num-episodes", "2", "--num-candidates", "1"]
    assert main(["evaluate", *common, str(tmp_path / "acting"), *evaluation]) == 0
    assert json.loads((tmp_path / "acting/most_expensive.json").read_text())["evaluate"]["steps"] == 5
    assert (tmp_path / "acting/evaluate.json").is_file()
    assert main(["evaluate", *common, str(tmp_path / "acting"), *evaluation]) == 2
