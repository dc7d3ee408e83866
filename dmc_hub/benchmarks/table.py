"""The table of docs/speed.md, from what the benchmarks wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmc_hub.benchmarks.profile import profile_tables
from dmc_hub.profiling import operations_table

KINDS = ("ratio", "cpu_ratio", "fastest_ratio")
START, END = "<!-- results: written by scripts/benchmark.py table -->", "<!-- end of the results -->"


@dataclass(frozen=True)
class Row:
    """One line: what is compared, the ratio that it must not exceed, and where a benchmark's file holds its report."""

    what: str
    limit: float
    benchmark: str
    find: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    names: tuple[str, ...] = ()


def _batch(size: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda result: result["batch_sizes"][size]


def _network(kind: str, size: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda result: result["networks"][kind][size]


def _loop(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda result: result["trainers"][name]


ROWS = (
    Row("a plan, batch 1, the slowest sampler / bare forwards", 1.15, "plan", _batch("1")),
    Row("a plan, batch 64, the slowest sampler / bare forwards", 1.05, "plan", _batch("64")),
    *(
        Row(f"{kind} forward, batch {size}, {name} / the original, eager", limit, "act", _network(kind, size), (name,))
        for kind in ("U-Net", "DiT")
        for size in ("1", "64")
        for name, limit in (("eager", 1.0), ("compiled", 0.7))
    ),
    *(
        Row(
            f"one decision among 64, {name} / guided by gradients",
            0.5,
            "act",
            lambda result: result["decision"],
            (name,),
        )
        for name in ("eager", "compiled", "compiled, bfloat16")
    ),
    Row(
        "a batch of 256 windows of 32 steps / a raw gather",
        2.0,
        "data",
        lambda result: result["windows"][-1]["batches"],
    ),
    Row("a training step, data included / forward, backward, optimiser", 1.05, "train", lambda result: result),
    *(
        Row(f"a step of the {name} trainer on tiny models / a bare loop", 1.2, "align", _loop(name))
        for name in ("denoising", "ddpo", "nft")
    ),
)


def write_table(page: Path, folder: Path) -> None:
    """Put the table between the marks of a page, from the JSON files of a folder.

    Raises:
        ValueError: the page has not the marks.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"`{page}` must have the lines {START} and {END} once each.")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n\n{table(folder)}\n{END}{after}", encoding="utf-8")


def table(folder: Path) -> str:
    """Markdown: a line for each of `ROWS` that was measured, the worst of its names."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    lines = [
        "| ratio | at most | wall, median | processor, median | processor, fastest | repeats |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        try:
            report = row.find(results[row.benchmark])
        except KeyError:
            lines.append(f"| {row.what} | {row.limit} | not measured | | | |")
            continue
        names = row.names or tuple(report["ratio"])
        figures = [max(report[kind][name] for name in names) for kind in KINDS]
        cells = " | ".join(f"{figure:.2f}{'' if figure <= row.limit else ' (missed)'}" for figure in figures)
        lines.append(f"| {row.what} | {row.limit} | {cells} | {report['repeats']} |")
    machines = {name: result["machine"] for name, result in results.items() if isinstance(result.get("machine"), dict)}
    lines += ["", *(f"- {name}: {_described(results[name], machine)}" for name, machine in machines.items())]
    for result in results.values():
        if "startup" in result:
            lines += ["", *_startup(result["startup"])]
        if "growth" in result:
            lines += ["", *_growth(result["growth"])]
        if "turns" in result:
            lines += ["", *_turns(result["turns"])]
        if "quality" in result:
            lines += ["", *_ranking(result)]
        if "profiles" in result:
            lines += profile_tables(result["profiles"])
        if "most_expensive" in result:
            lines += ["", f"Most expensive in `{result['command']}`:", "", *operations_table(result["most_expensive"])]
    return "\n".join(lines) + "\n"


def _described(result: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    return (
        f"`{result['command']}`; {machine['threads']} thread(s) of {machine['cpu_cores']} cores, {machine['name']}, "
        f"torch {result['versions']['torch']}"
    )


def _startup(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| what starts | at most, s | s, median | repeats |", "|---|---|---|---|"]
    for name, row in rows.items():
        missed = "" if row["seconds"] <= row["at_most"] else " (missed)"
        lines.append(f"| `{name}` | {row['at_most']} | {row['seconds']:.2f}{missed} | {row['repeats']} |")
    return lines


def _growth(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| what grows | values | milliseconds | exponent at the end |", "|---|---|---|---|"]
    for name, row in rows.items():
        values, times = (", ".join(f"{each:,}" for each in row[key]) for key in ("values", "milliseconds"))
        lines.append(f"| {name} | {values} | {times} | {row['exponent']:.2f} |")
    return lines


def _turns(turns: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| a step waits, in decisions for {turns['num_workers']} workers | {turns['num_workers']} workers in two "
        "halves that take turns / all at once, wall time | repeats |",
        "|---|---|---|",
    ]
    for share, report in turns["by_share"].items():
        [ratio] = report["ratio"].values()
        lines.append(f"| {share} | {ratio:.2f} | {report['repeats']} |")
    return lines


def _ranking(result: Mapping[str, Any]) -> list[str]:
    time, quality = result["time"], result["quality"]
    names = ["one candidate", time["floor"], *time["ratio"]]
    lines = [
        f"| early ranking of {result['num_candidates']} candidates | processor time of a decision, fastest | share of "
        f"the gain in value, {quality['task']} | return, {quality['num_episodes']} episodes |",
        "|---|---|---|---|",
    ]
    for name in names:
        row, ratio = quality[name], {time["floor"]: 1.0, **time["fastest_ratio"]}.get(name)
        earned = row["return"]
        figures = f"{row['share_of_gain']:.2f} | {earned['mean']:.2f} [{earned['low']:.2f}, {earned['high']:.2f}]"
        lines.append(f"| {name} | {'' if ratio is None else f'{ratio:.2f}'} | {figures} |")
    return lines
