"""A selection of the fault matrix that is quick enough for every run of the tests; `scripts/soak.py` has the rest.

Run as a script, this file is the process that tries the cases: each is a child of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import runner

SELECTION = [
    "1/sft",
    "1/iql",
    "6/too little room for the next save",
    "7/one checkpoint kept",
    "8/every file of a pipeline",
    "9/text for a number",
    "9/more than a billion weights",
    "9/a hundred thousand levels",
    "11/NaN once",
    "12/hangs, while training",
    "12/raises, before training",
    "12/raises on one of two processes",
    "14/one process dies",
    "16/verify=False",
    "17/optimizer.pt of a checkpoint",
    "17/adapter_model.bin",
    "17/a zarr codec that unpickles",
    "18/an environment's entry point",
    "19/500,000 tensors in an adapter",
    "19/zarr of 8 GB",
    "20/horizon",
    "20/alpha",
    "24/manifest.json",
    "24/optimizer.json",
    "24/zarr metadata",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("faults") / "results.json"
    environment = {**os.environ, "PYTHONPATH": str(runner.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.faults.test_selection", str(output)]
    subprocess.run(command, env=environment, capture_output=True, timeout=880, check=False)
    return json.loads(output.read_text())["cases"]


@pytest.mark.timeout(900)  # the first waits for all cases, on however busy a machine
@pytest.mark.parametrize("key", SELECTION)
def test_a_fault_ends_as_it_should(key: str, results: dict[str, Any]) -> None:
    assert results[key]["ok"], results[key]["detail"]
    assert results[key]["tried"] == results[key]["passed"] > 0


def test_every_row_has_its_cases() -> None:
    """All but resuming on a GPU, which needs one."""
    listed = {row for row in runner.MODULES if runner.cases_of(row, quick=True)} | set(runner.TESTS)
    assert listed == set(runner.ROWS) - {4}
    for test in [test for tests in runner.TESTS.values() for test in tests]:
        path, _, function = test.partition("::")
        assert (runner.ROOT / path).exists(), test
        assert not function or f"def {function}(" in (runner.ROOT / path).read_text(), test


def test_a_failing_case_is_told_from_a_passing_one(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.faults import runner
from tests.faults.cases import Case, Tally, must
outcomes = [
    runner.run_case(Case(1, "good", lambda folder: None)),
    runner.run_case(Case(1, "bad", lambda folder: must(False, "as it should not be"))),
    runner.run_case(Case(1, "half", lambda folder: Tally(2, 1))),
]
assert [outcome["ok"] for outcome in outcomes] == [True, False, False], outcomes
assert "as it should not be" in outcomes[1]["detail"], outcomes
"""
    environment = {**os.environ, "PYTHONPATH": str(runner.ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_is_written_between_the_markers(tmp_path: Path) -> None:
    cases = {"1/a": {"tried": 30, "passed": 30, "seconds": 60.0, "ok": True, "detail": ""}}
    cases["1/b"] = {**cases["1/a"], "passed": 29}
    content = {"quick": False, "machine": "2 cores", "rows": {"1": "kill -9", "4": "GPU"}, "cases": cases}
    (tmp_path / "r.json").write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- soak -->\nold\n<!-- end of soak -->\nafter\n")
    runner.write_table(tmp_path / "r.json", page)
    text = page.read_text()
    assert "| 1 | kill -9 | 60 | 59 | 2.0 | `python scripts/soak.py rows --rows 1` |" in text
    assert "| 4 | GPU | 0 | 0 |  | not run |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


if __name__ == "__main__":
    sys.exit(0 if runner.run_selection(SELECTION, Path(sys.argv[1])) else 1)
