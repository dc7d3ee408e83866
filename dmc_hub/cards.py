"""Model cards: what a repo says of itself, computed from report.json, with every text from outside escaped."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2.sandbox import ImmutableSandboxedEnvironment

REPORT_NAME = "report.json"
PICTURES = {
    "learning_curve.png": "Return over the stages",
    "trajectories.png": "Trajectories before and after alignment",
    "episodes.png": "The best, the median and the worst episode after alignment",
    "returns.png": "Returns before and after alignment",
    "diversity.png": "Return against the diversity of candidates",
    "critic.png": "The critic's values against the returns that followed in the data",
}
MAX_REPORT_BYTES = 16 << 20
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#|!~])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_REPORT_TYPES: dict[str, Any] = {
    "task": str,
    "controller": str,
    "methods": str,
    "command": str,
    "base_fingerprint": str,
    "pipeline_folder": str,
    "num_candidates": int,
    "episodes": int,
    "return_before": float,
    "return_after": float,
    "std_before": float,
    "std_after": float,
    "seed": int,
    "seeds": list,
    "validation_seeds": list,
    "acting": dict,
    "evaluations": list,
    "stages": list,
}


class Verbatim(str):
    """Text that a template may write as it is."""


def read_report(path: Path) -> dict[str, Any]:
    """A run's report.json, checked as far as cards use it.

    Raises:
        ValueError: naming the file, and the field that is missing or of the wrong kind.
    """
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise ValueError(f"`{path}` has {path.stat().st_size} bytes, more than a report has.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not a report: {error}.") from error
    if not isinstance(report, dict):
        raise ValueError(f"`{path}` is not a report: it holds a {type(report).__name__}.")
    for name, kind in _REPORT_TYPES.items():
        value = report.get(name)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ValueError(f"`{path}`: {name} must be a {kind.__name__}, got {value!r:.80}.")
    if not report["evaluations"] or not report["seeds"] or not report["validation_seeds"]:
        raise ValueError(f"`{path}`: there is no evaluation in it.")
    return report


def pictures_in(run: Path) -> dict[str, Path]:
    """The pictures that a run has left, by name."""
    return {name: run / name for name in PICTURES if (run / name).is_file()}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def adapter_card(
    report: Mapping[str, Any] | None,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    fingerprint: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The card of an adapter.

    Args:
        report: of the run that made it; without one the card has no results.
        repo_id: where it goes; without one the card speaks of the run's own folders.
        base_model: repo of the pipeline that it fits; likewise `base_revision`, a commit.
        fingerprint: of that pipeline's weights and settings.
        pictures: files beside the card.
    """
    extra: dict[str, Any] = {}
    if base_model is not None:
        extra = {"base_model": base_model, "base_model_relation": "adapter"}
    data = _card_data(report, "after", tags=["lora"], name=repo_id, **extra)
    values = {
        "repo_id": repo_id,
        "base_model": base_model,
        "base_revision": base_revision,
        "fingerprint": fingerprint or (report or {}).get("base_fingerprint"),
        "pictures": _pictures(pictures),
    }
    return _checked(render("adapter.md.jinja", {"report": report, **values, "metadata": _yaml(data)}))


def pipeline_card(
    report: Mapping[str, Any] | None,
    *,
    class_name: str,
    facts: Mapping[str, Any],
    repo_id: str | None = None,
    adapter_repo_id: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The card of a pipeline.

    Args:
        report: of the run that made it; without one the card has no results.
        class_name: of the pipeline.
        facts: what its index says of the task.
        repo_id: where it goes.
        adapter_repo_id: an adapter that was made for it.
        pictures: files beside the card.
    """
    data = _card_data(report, "before", tags=[], name=repo_id)
    values = {
        "class_name": class_name,
        "facts": facts,
        "repo_id": repo_id,
        "adapter_repo_id": adapter_repo_id,
        "pictures": _pictures(pictures),
    }
    return _checked(render("pipeline.md.jinja", {"report": report, **values, "metadata": _yaml(data)}))


def results_card(
    *,
    title: str,
    introduction: str,
    command: str,
    table: str,
    notes: Sequence[str],
    picture: str,
    machine: str,
    version: str,
) -> str:
    """The card of a table of results; its texts are the library's own, in Markdown.

    Args:
        title: of the card; likewise `introduction`.
        command: that repeats the results.
        table: in Markdown.
        notes: lines below it.
        picture: file beside the card.
        machine: that the results come from; likewise `version`, of this library.
    """
    data = ModelCardData(
        library_name="diffusers",
        license="apache-2.0",
        pipeline_tag="reinforcement-learning",
        tags=["dmc_hub", "diffusion", "offline-rl", "benchmark"],
    )
    texts = {"title": title, "introduction": introduction, "table": table, "picture": picture, "machine": machine}
    values: dict[str, Any] = {name: Verbatim(text) for name, text in texts.items()}
    values.update(command=command, version=version, notes=[Verbatim(note) for note in notes], metadata=_yaml(data))
    return _checked(render("results.md.jinja", values))


def eval_results(report: Mapping[str, Any], when: str) -> list[EvalResult]:
    """The report's figures `"before"` or `"after"` alignment, one result for each way of choosing actions."""
    results = []
    for row in report["evaluations"]:
        statistics = row[when]
        chosen = f"{row['action_selection']} of {row['num_candidates']}" if row["num_candidates"] > 1 else "one sample"
        if when == "after" and row.get("num_upsampling_passes"):
            chosen += f", {row['num_upsampling_passes']} x up-sampled"
        values = {"mean_reward": ("mean return", statistics["mean"], statistics["std"])}
        if row.get(f"coherency_{when}") is not None:
            values["coherency"] = ("coherency", row[f"coherency_{when}"], None)
        for metric, (name, value, std) in values.items():
            arguments = {
                "std": std,
                "episodes": report["episodes"],
                "seeds": [report["seeds"][0], report["seeds"][-1]],
                "training_seed": report["seed"],
                "action_selection": row["action_selection"],
                "num_candidates": row["num_candidates"],
            }
            results.append(
                EvalResult(
                    task_type="reinforcement-learning",
                    task_name="Reinforcement learning",
                    dataset_type=one_line(report["task"]),
                    dataset_name=one_line(report["task"]),
                    metric_type=metric,
                    metric_name=f"{name}, {one_line(chosen)}",
                    metric_value=_finite(value),
                    metric_args={k: v for k, v in arguments.items() if v is not None},
                )
            )
    return results


def render(template: str, values: Mapping[str, Any]) -> str:
    """One of the package's templates. Every string that is not `Verbatim` is escaped for Markdown."""
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_escaped
    )
    environment.filters.update(code=_code, fence=_fence, constant=_constant)
    source = (resources.files("dmc_hub.model_cards") / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def one_line(text: str) -> str:
    """The text without line breaks and other control characters."""
    return _CONTROL.sub(" ", str(text)).strip()


def _escaped(value: Any) -> Any:
    if isinstance(value, Verbatim) or not isinstance(value, str):
        return value
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", text).replace("://", r"\://")


def _constant(text: str) -> Verbatim:
    """A Python string."""
    return Verbatim(json.dumps(one_line(text), ensure_ascii=True))


def _code(text: str) -> Verbatim:
    """A code span; its delimiters are longer than any run of backticks inside."""
    text = one_line(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Verbatim(f"{ticks}{text}{ticks}" if len(ticks) == 1 else f"{ticks} {text} {ticks}")


def _fence(text: str, language: str = "") -> Verbatim:
    """A fenced block of one line."""
    text = one_line(text)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Verbatim(f"{ticks}{language}\n{text}\n{ticks}")


def _card_data(
    report: Mapping[str, Any] | None, when: str, *, tags: list[str], name: str | None, **extra: Any
) -> ModelCardData:
    if report is not None:
        tags = [*tags, one_line(report["controller"]), one_line(report["task"])]
        name = name or f"{report['task']}-{report['controller']}"
        extra.update(model_name=one_line(name).rpartition("/")[2], eval_results=eval_results(report, when))
    return ModelCardData(
        library_name="diffusers",
        license="apache-2.0",
        pipeline_tag="reinforcement-learning",
        tags=["dmc_hub", "diffusion", "offline-rl", *tags],
        **extra,
    )


def _yaml(data: ModelCardData) -> Verbatim:
    return Verbatim(data.to_yaml(line_break="\n"))


def _checked(card: str) -> str:
    """The card, once huggingface_hub reads its metadata back as they were written."""
    ModelCard(card)
    return card


def _pictures(names: Sequence[str]) -> list[tuple[Verbatim, str]]:
    return [(Verbatim(name), PICTURES[name]) for name in names if name in PICTURES]


def _finite(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"The report has a metric of {value!r}: a card holds finite numbers only.")
    return float(value)
