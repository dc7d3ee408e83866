"""The table of the paper's Nav1D cells: which cells, what a row holds, and that finished runs are found again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dmc_hub import reproduction
from dmc_hub.reproduction import Cell, reproduce_nav1d, table_cells


def test_the_cells_are_those_of_the_paper() -> None:
    cells = list(table_cells())
    assert len(cells) == 15 + 6
    assert len({(c.controller, c.sampler, c.selection, c.dataset) for c in cells}) == 21
    flow_partial = next(c for c in cells if c.sampler == "fm" and c.dataset == "partial")
    assert (flow_partial.paper_before, flow_partial.paper_after) == (2.3, 5.2)


def test_a_table_is_written_and_a_second_call_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell("policy", "fm", selection, "expert", 5.0, 6.0) for selection in ("expectation", "greedy")]
    monkeypatch.setattr(reproduction, "table_cells", lambda: iter(cells))
    rows = reproduce_nav1d(tmp_path, seeds=[3], training_scale=0.005, num_episodes=8)
    report = json.loads((tmp_path / "policy-fm-expert-3" / "report.json").read_text())
    for row, evaluation in zip(rows, (report["evaluations"][2], report["evaluations"][1]), strict=True):
        assert row["return_after"] == pytest.approx(np.mean(evaluation["returns_after"]))
        assert row["paper_after"] == 6.0
        assert row["seeds"] == [3]
    table = json.loads((tmp_path / "nav1d-table.json").read_text())
    assert table["cells"] == rows
    assert (tmp_path / "nav1d-table.md").read_text().count("| policy | fm |") == 2
    monkeypatch.setattr(reproduction, "align_task", lambda *_: pytest.fail("a finished run was repeated"))
    assert reproduce_nav1d(tmp_path, seeds=[3], training_scale=0.005, num_episodes=8) == rows
