"""The benchmarks of speed at tiny sizes, and the originals that they compare with."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dmc_hub.benchmarks import growth, originals, rollout, startup
from dmc_hub.benchmarks.act import measure_acting
from dmc_hub.benchmarks.data import measure_windows
from dmc_hub.benchmarks.growth import measure_growth
from dmc_hub.benchmarks.originals import CleanDiT, DiffuserUnet, DiffuserValue, guided_sampling
from dmc_hub.benchmarks.plan import SAMPLERS, PlannerSizes, measure_plans
from dmc_hub.benchmarks.profile import DONE, measure_profiles
from dmc_hub.benchmarks.ranking import measure_ranking
from dmc_hub.benchmarks.rollout import SIZES, measure_rollouts
from dmc_hub.benchmarks.table import END, START, table, write_table
from dmc_hub.benchmarks.timing import Clock
from dmc_hub.benchmarks.train import measure_loops, measure_training
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.plots import plot_growth
from dmc_hub.presets import preset_of
from dmc_hub.profiling import profiled
from dmc_hub.tasks import get_task

ROOT = Path(__file__).parents[1]
TINY = PlannerSizes(horizon=8, dim=32, dim_mults=(1, 2), num_inference_steps=2)


def check(report: dict[str, Any], *names: str) -> None:
    """A report of `Clock` on these and the floor, which are positive numbers."""
    assert set(report["milliseconds"]) == {report["floor"], *names}
    assert set(report["ratio"]) == set(report["cpu_ratio"]) == set(report["fastest_ratio"]) == set(names)
    assert all(value > 0 for value in report["milliseconds"].values())


def test_a_report_is_of_medians_over_those_of_the_floor() -> None:
    clock = Clock()
    for name, times in {"floor": (1.0, 2.0, 9.0), "other": (3.0, 30.0, 1.0)}.items():
        for time in times:
            clock.add(name, (5.0, 1.0), (5.0 + time, 1.0 + 10 * time))
    report = clock.report("floor")
    assert report["milliseconds"] == {"floor": 2000, "other": 3000}
    assert report["ratio"] == report["cpu_ratio"] == {"other": 1.5}
    assert report["cpu_milliseconds"]["floor"] == 20_000
    assert report["fastest_ratio"] == {"other": 1.0}
    assert report["repeats"] == 3


def test_plans() -> None:
    result = measure_plans(batch_sizes=(1, 3), sizes=TINY, repeats=1)
    assert result["batch_sizes"].keys() == {"1", "3"}
    for report in result["batch_sizes"].values():
        check(report, *SAMPLERS)


def test_acting() -> None:
    result = measure_acting(sizes=TINY, batch_sizes=(2,), num_candidates=2, compiles=False, repeats=1)
    for kind in ("U-Net", "DiT"):
        check(result["networks"][kind]["2"], "eager", "eager, nothing kept")
    check(result["decision"], "eager")


def test_training_and_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    check(measure_training(sizes=TINY, batch_size=4, num_steps=2000, repeats=2), "trainer")
    result = measure_loops(repeats=1)
    assert result["trainers"].keys() == {"denoising", "ddpo", "nft"}
    for report in result["trainers"].values():
        check(report, "trainer")


def test_windows() -> None:
    check(measure_windows(num_steps=3000, horizon=4, batch_size=256, repeats=1)["batches"], "episodes")


def test_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SHARES", (0.5, 1.0))
    sizes = dataclasses.replace(SIZES, dim=8, num_inference_steps=2)
    result = measure_rollouts(num_envs=2, num_workers=2, repeats=1, sizes=sizes)
    for report in result["turns"]["by_share"].values():
        check(report, "two halves in turn")
    (tmp_path / "rollout.json").write_text(json.dumps({**result, "command": "c", "versions": {"torch": "2"}}))
    assert "| a step waits, in decisions for 2 workers | 2 workers in two halves that take turns /" in table(tmp_path)
    for report in result["environments"].values():
        check(report, "run_episodes", "steps alone")
        assert report["steps"] == 8


def test_ranking(tmp_path: Path) -> None:
    task = get_task("nav1d-full")
    pipeline: Any = preset_of(task, "policy", "ddpm").build_pipeline(task.episodes(0, []), 0)
    torch.manual_seed(0)
    torch.nn.init.normal_(pipeline.denoiser.head.weight, std=0.05)  # it starts at zero
    pipeline.save_pretrained(tmp_path / "policy")
    counts: dict[str, Any] = {"num_candidates": 4, "num_states": 8, "num_episodes": 2, "repeats": 1}
    shares = ((0.5, 1.0), (0.5, 0.25))
    options: dict[str, Any] = {"task": task.name, "controller": "policy", "sizes": TINY}
    result = measure_ranking(tmp_path / "policy", shares=shares, **options, **counts)
    everything, some = (f"0.5 of the steps, {kept} go on" for kept in ("1", "0.25"))
    check(result["time"], everything, some)
    quality = result["quality"]
    assert quality["one candidate"]["value"] < quality[some]["value"] < quality["all to the end"]["value"]
    assert quality[everything] == quality["all to the end"]
    assert quality[everything]["share_of_gain"] == 1.0
    assert 0.0 < quality[some]["share_of_gain"] < 1.0
    (tmp_path / "ranking.json").write_text(json.dumps({**result, "command": "c", "versions": {"torch": "2"}}))
    rows = [
        line for line in table(tmp_path).splitlines() if line.startswith(("| one candidate |", "| all to the end |"))
    ]
    assert rows[0].startswith("| one candidate |  | 0.00 | ")
    assert rows[1].startswith("| all to the end | 1.00 | 1.00 | ")


def test_profiles_and_their_tables(tmp_path: Path) -> None:
    result = measure_profiles(sizes=dataclasses.replace(TINY, dim=8), batch_size=4, repeats=1)
    assert result["profiles"].keys() == {"plan", "act", "train", "align", "rollout"}
    for row in result["profiles"].values():
        assert len(row["operations"]) == 10
        assert row["repeats"] == 1
        assert 0 <= row["outside"] < 1
    calls = {path: row["operations"] for path, row in result["profiles"].items()}
    assert any("backward" in row["name"] for row in calls["train"] + calls["align"])
    assert not any("backward" in row["name"] for row in calls["plan"] + calls["act"] + calls["rollout"])
    result["profiles"]["plan"]["operations"][0] = {"name": "aten::mish", "calls": 2000, "share": 0.25}
    (tmp_path / "profile.json").write_text(json.dumps({**result, "command": "c", "versions": {"torch": "2"}}))
    text = table(tmp_path)
    assert "Most expensive in **rollout**, 16 episodes" in text
    assert f"| `aten::mish` | 2,000 | 25.0% | {DONE['aten::mish']} |" in text
    trained = text[text.index("Most expensive in **train**") : text.index("Most expensive in **rollout**")]
    assert "compile()" not in trained, "trainers compile nothing"


def test_growth_and_its_plot(tmp_path: Path) -> None:
    values = {"candidates": (1, 2), "horizon": (8, 16), "environments": (1, 2), "dataset steps": (1000, 2000)}
    assert {*values, "denoising steps", "processes"} == growth.VALUES.keys()
    result = measure_growth(values={**values, "denoising steps": (1, 2), "processes": (1, 2)}, sizes=TINY, repeats=1)
    for row in result["growth"].values():
        assert len(row["values"]) == len(row["milliseconds"]) == 2
        assert row["exponent"] is not None
    plot_growth(result["growth"], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    command = [sys.executable, "scripts/benchmark.py", "plan", "--batch-sizes", "1"]
    options = ["--repeats", "1", "--threads", "1", "--output", str(output)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    result = json.loads(output.read_text())
    assert {"benchmark", "command", "versions", "machine", "sizes", "batch_sizes"} <= result.keys()
    assert result["machine"]["threads"] == 1


def test_a_profile_ranks_by_time_of_their_own(tmp_path: Path) -> None:
    with profiled(tmp_path / "trace.json") as found:
        a = torch.randn(600, 600)
        for _ in range(5):
            a = a @ a / 600
    assert found[0]["name"] == "aten::mm"
    assert found[0]["calls"] == 5
    shares = [row["share"] for row in found]
    assert shares == sorted(shares, reverse=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    with profiled(None) as nothing:
        pass
    assert nothing == []


def test_the_table_says_what_was_missed_and_what_was_not_measured(tmp_path: Path) -> None:
    ratios = {"DDPM": 1.04, "DDIM": 1.2}
    report = {"ratio": ratios, "cpu_ratio": ratios, "fastest_ratio": {"DDPM": 1.0, "DDIM": 1.01}, "repeats": 3}
    (tmp_path / "plan.json").write_text(json.dumps({"batch_sizes": {"64": report}}))
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_table(page, tmp_path)
    text = page.read_text()
    assert "| 1.05 | 1.20 (missed) | 1.20 (missed) | 1.01 | 3 |" in text
    assert "batch 1, the slowest sampler / bare forwards | 1.15 | not measured" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    with pytest.raises(ValueError, match="must have the lines"):
        write_table(tmp_path / "plan.json", tmp_path)


# ---- The originals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: DiffuserUnet(14), 3_956_302),
        (lambda: DiffuserValue(14, 32), 1_488_801),
        (lambda: CleanDiT(11), 4_073_547),
    ],
)
def test_the_originals_have_their_published_sizes(build: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == parameters


def test_diffusers_unet_computes_what_ours_does() -> None:
    torch.manual_seed(0)
    original, ours = DiffuserUnet(5, 8, (1, 2, 4)), TemporalUnet(5, dim=8, dim_mults=(1, 2, 4))
    assert len(original.state_dict()) == len(ours.state_dict())
    renamed = {_our_name(name, 2): tensor for name, tensor in original.state_dict().items()}
    ours.load_state_dict(renamed)
    sample = torch.randn(3, 8, 5)
    expected = original(sample, torch.full((3,), 4.0))
    torch.testing.assert_close(ours(sample, 4).sample, expected, rtol=1e-5, atol=1e-5)


def _our_name(name: str, last: int) -> str:
    parts = {"time.1": "time_embedding.0", "time.3": "time_embedding.2", "downs": "down", "ups": "up"}
    places = {"0": "first", "1": "second", "2": "resample"}
    for theirs, ours in parts.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    pieces = name.split(".")
    if pieces[0] in ("down", "up"):
        pieces[2] = places[pieces[2]]
    if pieces[0] == "middle":
        pieces[1] = places[pieces[1]]
    name = ".".join(pieces)
    for block, ours in (("first.conv", "block_in.0"), ("first.norm", "block_in.1")):
        name = name.replace(f".{block}.", f".{ours}.")
    for block, ours in (("second.conv", "block_out.0"), ("second.norm", "block_out.1")):
        name = name.replace(f".{block}.", f".{ours}.")
    return name.replace("head.0.conv", "head.0.0").replace("head.0.norm", "head.0.1")


def test_guidance_raises_the_value_and_starts_at_the_observation() -> None:
    observations, shape = torch.full((8, 2), 0.3), (4, 3)

    def sample(scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_steps": 10, "scale": scale, "generator": generator}
        return guided_sampling(denoiser, value, observations, shape, **options)

    denoiser: Any = lambda x, t: 0.9 * x  # noqa: E731
    value: Any = lambda x, t: x[..., 2].sum(1, keepdim=True)  # noqa: E731
    plain, guided = sample(0.0), sample(0.5)
    assert torch.equal(guided[:, 0, :2], observations)
    assert guided[..., 2].mean() > plain[..., 2].mean() + 0.05
    assert originals._cosine_betas(20).max() <= 0.999


def test_an_import_is_what_it_adds_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {startup.TORCH: [1.0, 5.0, 1.0], startup.BOTH: [1.2, 5.1, 1.4], startup.HELP: [0.3, 2.0, 0.2]}
    names = {tuple(command): name for name, command in startup.COMMANDS.items()}
    monkeypatch.setattr(startup, "_seconds", lambda command: seconds[names[tuple(command)]].pop(0))
    found = startup.measure_startup(repeats=3)["startup"]
    assert found["import dmc_hub"]["seconds"] == pytest.approx(0.2)
    assert found["dmc-hub --help"]["seconds"] == pytest.approx(0.3)
