"""The Gradio app, and the folder that makes it a Space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dmc_hub import __version__, checkpoint
from dmc_hub.demo.walks import (
    FOUNDATION,
    MAX_CANDIDATES,
    MAX_EPISODES,
    Controller,
    Walks,
    draw_candidates,
    draw_walks,
    optimal_walks,
)
from dmc_hub.envs import nav1d

PIPELINES, ADAPTERS = "pipelines", "adapters"
Rows = list[list[Any]]


class Demo:
    """Pipelines and adapters by name, and what the page does with them.

    Args:
        pipelines: folders of pipelines of Nav1D.
        adapters: folders of adapters; each is offered with the pipeline that it was trained on.

    Raises:
        ValueError: no pipeline, one that is not of Nav1D, or an adapter that fits none of them.
    """

    def __init__(self, pipelines: Sequence[Path], adapters: Sequence[Path]) -> None:
        if not pipelines:
            raise ValueError("There is no pipeline to show: give the folder of at least one.")
        missing = [folder for folder in (*pipelines, *adapters) if not folder.is_dir()]
        if missing:
            raise ValueError(f"`{missing[0]}` is not a folder.")
        named = names_of(adapters)
        self.folders = {**names_of(pipelines)}
        self.controllers = {name: Controller.load(folder, named) for name, folder in self.folders.items()}
        fitting = {name for controller in self.controllers.values() for name in controller.adapters}
        if set(named) - fitting:
            name = min(set(named) - fitting)
            raise ValueError(f"The adapter in `{named[name]}` was trained on none of the pipelines.")

    @classmethod
    def from_folder(cls, folder: Path) -> Demo:
        """Of a folder that `save_space` wrote."""
        parts = [sorted(path for path in (folder / part).glob("*") if path.is_dir()) for part in (PIPELINES, ADAPTERS)]
        return cls(*parts)

    def choices(self, pipeline: str) -> list[str]:
        """The foundation and its adapters."""
        return self._controller(pipeline).choices

    def show(
        self, pipeline: str, adapter: str, start: float, num_candidates: float, step: float, seed: float
    ) -> tuple[np.ndarray, np.ndarray, Rows]:
        """An episode before and after from one start, and the candidates of one decision after.

        Returns:
            The pictures of the episodes and of the candidates, and the candidates' rows: action, position after it, Q,
            whether it was taken, by falling Q.
        """
        controller, starts = self._controller(pipeline), np.array([float(start)])
        options = {"num_candidates": int(num_candidates), "seed": int(seed)}
        before = controller.walk(FOUNDATION, starts, **options)
        after = before if adapter == FOUNDATION else controller.walk(adapter, starts, **options)
        shown = [("before", before), ("after", after), ("optimum", optimal_walks(starts))]
        if adapter == FOUNDATION:
            del shown[1]
        step = min(max(int(step), 1), nav1d.HORIZON) - 1
        actions = after.candidates[step, 0]
        reached, _ = nav1d.step(after.paths[0, step], actions, step)
        values = np.full(len(actions), np.nan) if after.values is None else after.values[step, 0]
        order = np.argsort(-values, kind="stable")
        taken = int(np.abs(actions - after.actions[step, 0]).argmin())
        rows = [
            [round(float(x), 3) for x in (actions[i], reached[i], values[i])] + ["taken" if i == taken else ""]
            for i in order
        ]
        return draw_walks(shown), draw_candidates(after, step), rows

    def compare(
        self, pipeline: str, adapters: Sequence[str], num_episodes: float, num_candidates: float, seed: float
    ) -> tuple[np.ndarray, Rows]:
        """Episodes of several adapters from the same starts.

        Returns:
            A picture of the first episodes, and a row for each: name, mean and standard deviation of the return, share
            of the optimum from these starts.
        """
        controller, count = self._controller(pipeline), int(num_episodes)
        if not 1 <= count <= MAX_EPISODES:
            raise ValueError(f"Episodes go from 1 to {MAX_EPISODES}.")
        starts = np.random.default_rng(abs(int(seed))).uniform(-1, 1, count)
        optimum = optimal_walks(starts)
        shown = []
        for name in dict.fromkeys([FOUNDATION, *adapters]):
            walks = controller.walk(name, starts, num_candidates=int(num_candidates), seed=int(seed))
            shown.append((name, walks))
        rows = [_scores(name, walks, optimum) for name, walks in (*shown, ("optimum", optimum))]
        return draw_walks(shown), rows

    def _controller(self, pipeline: str) -> Controller:
        if pipeline not in self.controllers:
            raise ValueError(f"There is no pipeline {pipeline!r}.")
        return self.controllers[pipeline]


def _scores(name: str, walks: Walks, optimum: Walks) -> list[Any]:
    mean, std = float(walks.returns.mean()), float(walks.returns.std())
    return [name, round(mean, 2), round(std, 2), f"{mean / optimum.returns.mean():.1%}"]


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """A short name for each folder: its own, or its parent's where it is called pipeline or adapter."""
    named: dict[str, Path] = {}
    for folder in folders:
        resolved = folder.resolve()
        name = resolved.parent.name if resolved.name in ("pipeline", "adapter") else resolved.name
        unique, number = name, 2
        while unique in named:
            unique, number = f"{name}-{number}", number + 1
        named[unique] = folder
    return named


def build_app(demo: Demo) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        ImportError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("Gradio is not installed: `pip install dmc_hub[demo]`.") from error

    def guarded(function: Any) -> Any:
        """Show what was wrong with an input; everything else stays in the log."""

        def call(*inputs: Any) -> Any:
            try:
                return function(*inputs)
            except (ValueError, TimeoutError) as error:
                raise gr.Error(str(error)) from error

        return call

    first = next(iter(demo.controllers))
    choices = demo.choices(first)
    with gr.Blocks(title="Nav1D, before and after alignment", analytics_enabled=False) as app:
        gr.Markdown(
            "# Nav1D, before and after alignment\nEight steps on a line; the reward of each step is highest at its own "
            "target, in blue. Move the start, choose an adapter, look at the candidates of a decision."
        )
        with gr.Row():
            pipeline = gr.Dropdown(list(demo.controllers), value=first, label="Pipeline")
            adapter = gr.Dropdown(choices, value=choices[-1], label="Adapter")
        with gr.Row():
            candidates = gr.Slider(1, MAX_CANDIDATES, 16, step=1, label="Candidates per decision")
            seed = gr.Slider(0, 999, 0, step=1, label="Seed")
        with gr.Tab("Watch"):
            with gr.Row():
                start = gr.Slider(-1, 1, 0, step=0.01, label="Start")
                step = gr.Slider(1, nav1d.HORIZON, 1, step=1, label="Decision")
            run = gr.Button("Run an episode", variant="primary")
            with gr.Row():
                episode = gr.Image(show_label=False, type="numpy", format="png")
                decision = gr.Image(show_label=False, type="numpy", format="png")
            table = gr.Dataframe(headers=["action", "position after it", "Q", ""], label="Candidates", type="array")
        with gr.Tab("Compare"):
            compared = gr.CheckboxGroup(choices[1:], value=choices[1:], label="Adapters")
            episodes = gr.Slider(1, MAX_EPISODES, 64, step=1, label="Episodes")
            compare = gr.Button("Compare", variant="primary")
            paths = gr.Image(show_label=False, type="numpy", format="png")
            scores = gr.Dataframe(
                headers=["controller", "return", "standard deviation", "of the optimum"], label="Returns", type="array"
            )

        def offer(name: str) -> tuple[Any, Any]:
            known = demo.choices(name)
            return gr.Dropdown(known, value=known[-1]), gr.CheckboxGroup(known[1:], value=known[1:])

        limits: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "controller"}
        inputs = [pipeline, adapter, start, candidates, step, seed]
        events = [run.click, start.release, step.release]
        gr.on(events, guarded(demo.show), inputs, [episode, decision, table], api_name="show", **limits)
        compare.click(
            guarded(demo.compare),
            [pipeline, compared, episodes, candidates, seed],
            [paths, scores],
            api_name="compare",
            **limits,
        )
        pipeline.change(guarded(offer), pipeline, [adapter, compared], api_name=False)
    app.queue(max_size=32)
    return app


def save_space(demo_pipelines: Sequence[Path], demo_adapters: Sequence[Path], folder: str | os.PathLike[str]) -> None:
    """Write a folder that is a Gradio Space: app.py, requirements.txt, card, and copies of the pipelines and adapters.

    `python app.py` inside it serves the page, as a Space does.

    Raises:
        ValueError: as `Demo`.
    """
    Demo(demo_pipelines, demo_adapters)  # refuses what does not fit
    templates = resources.files("dmc_hub.model_cards") / "space"
    with checkpoint.write_folder_atomically(folder) as stage:
        for name in ("app.py", "requirements.txt", "README.md"):
            text = (templates / f"{name}.txt").read_text(encoding="utf-8")
            (stage / name).write_text(text.replace("@VERSION@", _minimum_version()), encoding="utf-8")
        for part, folders in ((PIPELINES, demo_pipelines), (ADAPTERS, demo_adapters)):
            for name, source in names_of(folders).items():
                shutil.copytree(source, stage / part / name, ignore=shutil.ignore_patterns(".*"))


def serve(demo: Demo, *, port: int) -> None:
    """Serve the page on this machine until it is interrupted; `port` 0 takes a free one."""
    app = build_app(demo)
    app.launch(server_name="127.0.0.1", server_port=port or None, share=False, quiet=False)


def _minimum_version() -> str:
    """Of this library, without a development suffix."""
    return __version__.partition(".dev")[0]
