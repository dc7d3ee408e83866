"""Row 9: configurations of a saved pipeline that are damaged, wrong or too large, and options of the command line."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dmc_hub import checkpoint, cli
from dmc_hub.errors import DmcHubError
from dmc_hub.hub import load_pipeline
from tests.faults.cases import Case, must, peak_bytes
from tests.faults.small import save_pipeline

CONFIG, WEIGHTS = "denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors"


def _set(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def _text(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def _weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _twice_as_wide(tensors: dict[str, Any]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1))


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no JSON": (_text(CONFIG, "{"), ("config.json", "not JSON")),
    "nothing": (_text(CONFIG, ""), ("config.json", "not JSON")),
    "a list": (_text(CONFIG, "[]"), ("config.json", "list")),
    "nested brackets": (_text(CONFIG, "[" * 100_000), ("config.json", "not JSON")),
    "an unknown key": (_set(attention="linear"), ("config.json", "attention", "does not know")),
    "text for a number": (_set(dim="eight"), ("config.json", "'dim' must be int, got 'eight'")),
    "a fraction for a whole number": (_set(dim=8.5), ("'dim' must be int, got 8.5",)),
    "null for a number": (_set(dim=None), ("'dim' must be int, got None",)),
    "true for a number": (_set(dim=True), ("'dim' must be int, got True",)),
    "a number for a list": (_set(dim_mults=3), ("'dim_mults' must be", "got 3")),
    "text in a list": (_set(dim_mults=[1, "2"]), ("'dim_mults' must be", "got [1, '2']")),
    "an object for a number": (_set(dim={"a": 1}), ("'dim' must be int",)),
    "zero": (_set(dim=0), ("denoiser",)),
    "a negative number": (_set(dim=-8), ("denoiser",)),
    "more than a billion weights": (_set(dim=100_000), ("config.json", "describes a network of more than")),
    "the largest number": (_set(dim=10**9), ("config.json", "dim=1000000000")),
    "not a number": (_set(dim=float("nan")), ("config.json", "dim")),
    "infinity": (_set(dim=float("inf")), ("config.json", "dim")),
    "a hundred thousand levels": (_set(dim_mults=[1] * 100_000), ("'dim_mults' has 100,000 entries",)),
    "another width": (_set(dim=16), ("denoiser",)),
    "no weight of one layer": (_weights(lambda tensors: tensors.pop(sorted(tensors)[0])), ("it lacks",)),
    "a weight too many": (
        _weights(lambda tensors: tensors.update(x=next(iter(tensors.values())).clone())),
        ("unknown ['x']",),
    ),
    "a weight of another shape": (_weights(_twice_as_wide), ("has shape", "its configuration says")),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), ("model_index.json",)),
    "an index of numbers": (_text("model_index.json", '{"_class_name": 3}'), ("_class_name is 3",)),
    "a schedule of text": (
        _text("scheduler/scheduler_config.json", '{"num_train_timesteps": "ten"}'),
        ("scheduler_config.json", "'num_train_timesteps' must be int, got 'ten'"),
    ),
}

OPTIONS: dict[str, tuple[list[str], str]] = {
    "an unknown option": (["--stpes", "3"], "there is no option `--stpes`"),
    "text for a number": (["--max-steps", "many"], "max-steps"),
    "a number out of range": (["--training-scale", "-1"], "`training_scale` must be positive"),
    "a choice that there is not": (["--controller", "brain"], "controller"),
    "an unknown task": (["--task", "nothing"], "nothing"),
    "an unknown method": (["--methods", "ppo"], "`methods`"),
}


def refused(name: str, folder: Path) -> None:
    """In less than a second, with little memory, by our error that says where."""
    saved = save_pipeline(folder / "pipeline")
    load_pipeline(saved)  # imports what loading needs
    change, words = CHANGES[name]
    change(saved)
    (saved / checkpoint.MANIFEST_NAME).unlink()
    before, start = peak_bytes(), time.monotonic()
    try:
        load_pipeline(saved)
    except (DmcHubError, FileNotFoundError) as error:
        missing = [word for word in words if word not in str(error)]
        must(not missing, f"{missing} not in: {error}")
    else:
        must(False, "it was loaded")
    seconds, grown = time.monotonic() - start, peak_bytes() - before
    must(seconds < 1.0, f"it took {seconds:.1f} s")
    must(grown < 500 << 20, f"it took {grown >> 20} MiB")


def option_refused(name: str, folder: Path) -> None:
    argv, word = OPTIONS[name]
    output, errors = ["--output-dir", str(folder / "run")], io.StringIO()
    defaults = [] if "--task" in argv else ["--task", "nav1d-full"]
    with redirect_stderr(errors):
        code = cli.main(["align", *defaults, *output, *argv])
    must(code == 2 and word in errors.getvalue() and errors.getvalue().count("\n") == 1, f"{code}: {errors.getvalue()}")
    must(not (folder / "run").exists(), "the folder was made")


def cases(quick: bool) -> Iterator[Case]:
    """Of the row."""
    for name in CHANGES:
        yield Case(9, name, partial(refused, name))
    for name in OPTIONS:
        yield Case(9, f"option: {name}", partial(option_refused, name))
