"""Rows 8, 16 and 20: every file of what was saved truncated, missing or changed; adapters of another base."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmc_hub import checkpoint
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.errors import DmcHubError
from dmc_hub.hub import load_pipeline
from dmc_hub.models.dit import DiffusionTransformer1D
from tests.faults.cases import Case, Tally, must
from tests.faults.small import planner, save_adapter, save_pipeline
from tests.trainers.test_base import StopAt, make_trainer, state_of


def damages(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to damage a file."""
    content = path.read_bytes()
    middle = len(content) // 2
    yield "empty", lambda: path.write_bytes(b"")
    yield "half", lambda: path.write_bytes(content[:middle])
    yield "missing", path.unlink
    for position in (0, middle, len(content) - 1):
        flipped = bytes([content[position] ^ 1])
        yield f"bit {position}", partial(path.write_bytes, content[:position] + flipped + content[position + 1 :])


def every_file(folder: Path, load: Callable[[], Any], errors: tuple[type[BaseException], ...]) -> Tally:
    """Damage each file in each way: `load` must raise one of the errors, naming the file."""
    tried = 0
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = path.read_bytes()
        for name, inflict in damages(path):
            inflict()
            try:
                load()
            except errors as error:
                must(path.name in str(error), f"{name} of {path.name}: {error}")
            else:
                must(path.name == checkpoint.MANIFEST_NAME and name == "missing", f"{name} of {path.name} was loaded")
            tried += 1
            path.write_bytes(content)
    load()
    return Tally(tried, tried, "file and reason named")


def pipeline_files(folder: Path) -> Tally:
    saved = save_pipeline(folder / "pipeline")
    return every_file(saved, lambda: load_pipeline(saved), (DmcHubError,))


def adapter_files(folder: Path) -> Tally:
    saved, pipeline = save_adapter(folder / "adapter"), planner()
    before = pipeline.base_fingerprint()

    def load() -> None:
        pipeline.load_lora_weights(saved)
        pipeline.unload_lora()

    tally = every_file(saved, load, (DmcHubError,))
    must(pipeline.base_fingerprint() == before and not pipeline.lora_names, "the pipeline was changed")
    return tally


def checkpoint_files(folder: Path) -> Tally:
    """A damaged newest checkpoint is skipped with a warning that names it; a damaged one that is asked for, refused."""
    run = folder / "run"
    options: dict[str, Any] = {"lora": True, "ema_decay": 0.9}
    make_trainer(run, callbacks=[StopAt(4)], **options).train()
    newest, tried = run / "checkpoint-4", 0
    trainer = make_trainer(run, **options)
    before = state_of(trainer)
    for path in sorted(file for file in newest.rglob("*") if file.is_file()):
        content = path.read_bytes()
        for name, inflict in damages(path):
            inflict()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                must(checkpoint.latest_checkpoint(run) == run / "checkpoint-2", f"{name} of {path.name} was taken")
            said = " ".join(str(warning.message) for warning in caught)
            must("checkpoint-4" in said and path.name in said, said)
            try:
                trainer.train(resume_from_checkpoint=newest)
            except CheckpointError as error:
                must(path.name in str(error), str(error))
            else:
                must(False, f"{name} of {path.name} was loaded")
            now = state_of(trainer)
            must(all(torch.equal(value, now[key]) for key, value in before.items()), "the weights were changed")
            tried += 1
            path.write_bytes(content)
    return Tally(tried, tried, "checkpoint before taken, newest named, weights unchanged")


MISMATCHES: dict[str, dict[str, Any]] = {
    "weights": {"seed": 1},
    "depth": {"mults": (1, 2, 2)},
    "width": {"mults": (1, 4)},
    "schedule": {"timesteps": 20},
    "normaliser": {"low": -2.0},
    "width of observations": {"observation_dim": 4},
    "horizon": {"horizon": 8},
}


def mismatch(name: str, folder: Path) -> None:
    """An adapter of a pipeline that differs in one thing is refused, and the pipeline left alone."""
    saved = save_adapter(folder / "adapter", **MISMATCHES[name])
    pipeline = planner()
    before = pipeline.base_fingerprint()
    try:
        pipeline.load_lora_weights(saved)
    except ValueError as error:
        must("was trained on another base" in str(error), str(error))
    else:
        must(False, "it was loaded")
    must(pipeline.base_fingerprint() == before and not pipeline.lora_names, "the pipeline was changed")


def changed_alpha(folder: Path) -> None:
    """Also without the manifest."""
    saved = save_adapter(folder / "adapter")
    config = saved / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 60}))
    (saved / checkpoint.MANIFEST_NAME).unlink()
    try:
        planner().load_lora_weights(saved)
    except ValueError as error:
        must("disagree on lora_alpha" in str(error), str(error))
    else:
        must(False, "it was loaded")


def allowed_mismatch(folder: Path) -> None:
    saved, pipeline = save_adapter(folder / "adapter", seed=1), planner()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.load_lora_weights(saved, allow_mismatch=True)
    must(any("loaded all the same" in str(warning.message) for warning in caught), "no warning")
    must(pipeline.lora_names == ["default"], "it was not loaded")


def cost_of_verifying(dim: int, folder: Path) -> Tally:
    """Share of the time of loading a network again and again, the best of 15 times; the criterion is 5 %."""
    pipeline = planner()
    pipeline.denoiser = DiffusionTransformer1D(4, dim=dim, num_heads=4, depth=4)
    pipeline.register_modules(denoiser=pipeline.denoiser)
    pipeline.save_pretrained(folder / "pipeline")
    _seconds(folder / "pipeline", True)  # imports, and the file system's cache
    times = [[_seconds(folder / "pipeline", verify) for verify in (True, False)] for _ in range(15)]
    seconds = {verify: min(row[place] for row in times) for place, verify in enumerate((True, False))}
    size = sum(path.stat().st_size for path in (folder / "pipeline").rglob("*") if path.is_file())
    share = seconds[True] / seconds[False] - 1
    detail = f"{size >> 20} MiB: {seconds[False]:.3f} s, with verification {seconds[True]:.3f} s ({share:+.1%})"
    return Tally(1, int(share < 0.05), detail)


def _seconds(folder: Path, verify: bool) -> float:
    start = time.perf_counter()
    load_pipeline(folder, verify=verify)
    return time.perf_counter() - start


def without_verifying(folder: Path) -> None:
    """`verify=False` loads what was changed by hand, and is not the default."""
    saved = save_pipeline(folder / "pipeline")
    path = saved / "denoiser" / "config.json"
    path.write_text(path.read_text() + "\n")
    load_pipeline(saved, verify=False)
    try:
        load_pipeline(saved)
    except CheckpointError:
        shutil.rmtree(saved)
    else:
        must(False, "a changed file was loaded")


def cases(quick: bool) -> Iterator[Case]:
    """Of the three rows."""
    yield Case(8, "every file of a checkpoint", checkpoint_files)
    yield Case(8, "every file of a pipeline", pipeline_files)
    yield Case(8, "every file of an adapter", adapter_files)
    yield Case(16, "verify=False", without_verifying)
    yield Case(16, "cost of verifying 42 MiB", partial(cost_of_verifying, 384))
    yield Case(16, "cost of verifying 167 MiB", partial(cost_of_verifying, 768))
    for name in MISMATCHES:
        yield Case(20, name, partial(mismatch, name))
    yield Case(20, "alpha", changed_alpha)
    yield Case(20, "allow_mismatch", allowed_mismatch)
