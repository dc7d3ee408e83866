"""Runs the cases of the fault matrix one by one, each in a process of its own, and writes down what came of it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dmc_hub import checkpoint
from tests.faults.cases import Case, Tally, fork, wait

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    1: "kill -9 at random times, each trainer and the sequential aligner",
    2: "kill -9 at every file event of a save",
    3: "kill -9 of one or both of two processes",
    4: "resume on a GPU",
    5: "resume in the middle of a buffer, of each trainer",
    6: "no space, no permission, quota, at every file event",
    7: "one checkpoint kept",
    8: "truncated, missing and changed files",
    9: "configurations that are damaged, wrong or too large",
    10: "defects of data",
    11: "NaN on one of two processes",
    12: "reward functions that fail",
    13: "environments that fail",
    14: "processes that die, hang or raise",
    15: "faults of the Hub",
    16: "corrupt downloads",
    17: "malicious pickles",
    18: "hostile repos",
    19: "decompression and declaration bombs",
    20: "adapters of another base",
    21: "secrets beside what is pushed",
    22: "SIGINT and SIGTERM",
    23: "two runs in one folder",
    24: "fuzzed files",
    25: "the demo",
}
MODULES = {
    1: "kills",
    2: "file_events",
    3: "ranks",
    5: "kills",
    6: "file_events",
    7: "kills",
    8: "damage",
    9: "configurations",
    10: "dataset_cases",
    11: "ranks",
    12: "rewards",
    14: "ranks",
    16: "damage",
    17: "pickles",
    18: "pickles",
    19: "bombs",
    20: "damage",
    22: "signals",
    23: "signals",
    24: "fuzz",
}
"""Where the cases of a row are, in this folder."""
TESTS: dict[int, list[str]] = {
    10: ["tests/faults/test_datasets.py"],
    13: ["tests/envs/test_workers.py"],
    15: ["tests/hub/test_faults.py"],
    16: [
        "tests/hub/test_faults.py::test_a_file_that_stays_wrong_is_refused_by_name",
        "tests/hub/test_faults.py::test_a_damaged_copy_on_this_machine_is_replaced",
        "tests/hub/test_faults.py::test_a_manifest_that_was_changed_is_refused",
    ],
    17: ["tests/hub/test_security.py::test_a_pickle_in_a_folder_never_runs", "tests/faults/test_no_pickle.py"],
    18: [
        "tests/hub/test_security.py::test_a_hostile_pipeline_is_refused",
        "tests/hub/test_security.py::test_a_hostile_adapter_is_refused",
        "tests/hub/test_faults.py::test_all_files_are_of_one_commit",
        "tests/faults/test_datasets.py::test_a_card_that_reads_elsewhere_is_refused",
    ],
    19: [
        "tests/data/readers/test_d4rl.py::test_a_small_file_that_declares_gigabytes",
        "tests/data/readers/test_replay_zarr.py::test_zip_bombs_and_paths_outside",
    ],
    21: [
        "tests/hub/test_security.py::test_only_what_belongs_to_it_is_pushed",
        "tests/hub/test_security.py::test_a_path_of_this_machine_does_not_travel",
        "tests/hub/test_security.py::test_a_symlink_is_not_pushed",
    ],
    25: ["tests/demo"],
}
"""Tests that try cases of a row."""
SECONDS = 3600.0


def cases_of(row: int, *, quick: bool) -> list[Case]:
    """The cases of a row that are functions."""
    if row not in MODULES:
        return []
    module = importlib.import_module(f"tests.faults.{MODULES[row]}")
    return [case for case in module.cases(quick) if case.row == row]


def run_rows(rows: Sequence[int], output: Path, *, quick: bool) -> bool:
    """Run the cases that `output` does not hold yet, and add each as it ends; returns whether all passed."""
    results = _results(output)
    for row in rows:
        for case in cases_of(row, quick=quick):
            key = f"{row}/{case.name}"
            if key not in results or not results[key]["ok"]:
                _report(key, run_case(case), results, output, quick)
        for test in TESTS.get(row, ()):
            key = f"{row}/{test}"
            if key not in results or not results[key]["ok"]:
                _report(key, run_tests(test), results, output, quick)
    return all(result["ok"] for key, result in results.items() if int(key.partition("/")[0]) in rows)


def run_selection(keys: Sequence[str], output: Path) -> bool:
    """Run some cases, as `row/name`, quickly; returns whether all passed."""
    cases = {f"{row}/{case.name}": case for row in MODULES for case in cases_of(row, quick=True)}
    results = _results(output)
    for key in keys:
        _report(key, run_case(cases[key]), results, output, quick=True)
    return all(result["ok"] for result in results.values())


def _results(output: Path) -> dict[str, Any]:
    kept: dict[str, Any] = {} if not output.is_file() else checkpoint.load_json(output)
    return kept.get("cases", {})


def _report(key: str, result: dict[str, Any], results: dict[str, Any], output: Path, quick: bool) -> None:
    results[key] = result
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}"
    kept = checkpoint.load_json(output) if output.is_file() else {}
    rows = {str(row): fault for row, fault in ROWS.items()}
    checkpoint.save_json(output, {**kept, "quick": quick, "machine": machine, "rows": rows, "cases": results})
    state = "ok" if result["ok"] else "FAILED"
    sys.stdout.write(
        f"{state:6} {key}: {result['passed']} of {result['tried']}, {result['seconds']:.1f} s {result['detail']}\n"
    )
    sys.stdout.flush()


def run_case(case: Case) -> dict[str, Any]:
    """Run a case in a child, in a folder of its own that is removed if it passes."""
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{case.row}-"))
    (folder / "case").mkdir()
    start = time.monotonic()

    def work() -> None:
        tally = case.run(folder / "case") or Tally(1, 1)
        checkpoint.save_json(folder / "tally.json", vars(tally))

    code = wait(process := fork(work, folder / "log"), SECONDS)
    if code is None:
        os.kill(process, 9)
        os.waitpid(process, 0)
    seconds = time.monotonic() - start
    if code == 0:
        tally = checkpoint.load_json(folder / "tally.json")
        shutil.rmtree(folder, ignore_errors=True)
        return {**tally, "ok": tally["tried"] == tally["passed"], "seconds": seconds}
    lines = (folder / "log").read_text(errors="replace").strip().splitlines()
    detail = next((line for line in reversed(lines) if not line.startswith(" ")), f"ended with {code}")
    return {"tried": 1, "passed": 0, "ok": False, "detail": f"{detail[:300]} (log: {folder.name})", "seconds": seconds}


def run_tests(test: str) -> dict[str, Any]:
    """Run a test file or function of this repository, and count its cases."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", test]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.is_file():
            return {"tried": 1, "passed": 0, "ok": False, "detail": done.stdout[-300:], "seconds": 0.0}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    tried, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    wrong = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    result = {"tried": tried - skipped, "passed": tried - skipped - wrong, "ok": wrong == 0 and tried > skipped}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    detail = "; ".join(failed)[:300] or (f"{skipped} skipped" if skipped else "")
    return {**result, "detail": detail, "seconds": time.monotonic() - start}


def write_table(results: Path, page: Path) -> None:
    """Put the table of the results between the markers of a page."""
    content = json.loads(results.read_text(encoding="utf-8"))
    lines = ["| row | fault | tried | passed | minutes | command |", "| --- | --- | --- | --- | --- | --- |"]
    for row, fault in content["rows"].items():
        mine = [result for key, result in content["cases"].items() if key.partition("/")[0] == row]
        counts = [f"{sum(result[name] for result in mine):,}" for name in ("tried", "passed")]
        minutes = f"{sum(result['seconds'] for result in mine) / 60:.1f}"
        cells = [*counts, minutes, f"`python scripts/soak.py rows --rows {row}`"] if mine else ["0", "0", "", "not run"]
        lines.append(f"| {row} | {fault} | {' | '.join(cells)} |")
    lines.append(f"\n{content['machine']}{', quick' if content['quick'] else ''}.")
    if "memory" in content:
        lines.append(f"\n{content['memory']['text']}")
    start, end = "<!-- soak -->\n", "<!-- end of soak -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    checkpoint.write_text(page, f"{before}{start}\n{chr(10).join(lines)}\n\n{end}{after}")
