"""What the page shows is what the controllers do."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from dmc_hub import Agent
from dmc_hub.demo.app import Demo, names_of, save_space
from dmc_hub.demo.walks import FOUNDATION, Controller, draw_candidates, draw_walks, optimal_walks
from dmc_hub.envs import nav1d
from dmc_hub.hub import load_pipeline


@pytest.fixture(scope="module")
def demo(folders: Path) -> Demo:
    return Demo([folders / "first/pipeline"], [folders / "gentle/adapter", folders / "bold/adapter"])


def test_adapters_are_offered_where_they_fit(demo: Demo) -> None:
    assert list(demo.controllers) == ["first"]
    assert demo.choices("first") == [FOUNDATION, "gentle", "bold"]


@pytest.mark.parametrize("adapter", [FOUNDATION, "bold"])
def test_walk_is_an_episode_of_the_environment(folders: Path, demo: Demo, adapter: str) -> None:
    env = gymnasium.make("dmc_hub/Nav1D-v0")
    observation, _ = env.reset(seed=4)
    walk = demo.controllers["first"].walk(adapter, observation[:1], num_candidates=3, seed=7)
    pipeline = load_pipeline(folders / "first/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    if adapter != FOUNDATION:
        pipeline.load_lora_weights(folders / adapter / "adapter")
    agent, generator = Agent(pipeline), torch.Generator().manual_seed(7)
    for t in range(nav1d.HORIZON):
        output = agent(observation[None], num_candidates=3, generator=generator)
        np.testing.assert_allclose(walk.candidates[t], output.candidates[..., 0], atol=1e-5)
        assert walk.values is not None
        np.testing.assert_allclose(walk.values[t], output.values, atol=1e-4)
        observation, reward, _, _, _ = env.step(output.action[0])
        assert walk.paths[0, t + 1] == pytest.approx(observation[0], abs=1e-5)
        assert walk.rewards[0, t] == pytest.approx(reward, abs=1e-4)


def test_switching_adapters_leaves_nothing_behind(demo: Demo) -> None:
    controller, starts = demo.controllers["first"], np.array([0.3])

    def path(adapter: str) -> np.ndarray:
        return controller.walk(adapter, starts, num_candidates=2, seed=0).paths

    first = {adapter: path(adapter) for adapter in demo.choices("first")}
    assert not np.array_equal(first[FOUNDATION], first["bold"])
    assert not np.array_equal(first["gentle"], first["bold"])
    for adapter in ("bold", FOUNDATION, "gentle", "bold"):
        np.testing.assert_array_equal(path(adapter), first[adapter])


def test_optimal_walks_earn_the_optimum() -> None:
    starts = np.linspace(-1, 1, 401)
    assert optimal_walks(starts).returns.mean() == pytest.approx(nav1d.optimal_return(), abs=5e-3)


def test_show_lists_the_candidates_by_value(demo: Demo) -> None:
    episode, decision, rows = demo.show("first", "bold", 0.25, 5, 3, 0)
    assert episode.shape == decision.shape
    assert episode.std() > 1
    values = [row[2] for row in rows]
    assert values == sorted(values, reverse=True)
    assert [row[3] for row in rows] == ["taken", "", "", "", ""]
    walk = demo.controllers["first"].walk("bold", np.array([0.25]), num_candidates=5, seed=0)
    assert rows[0][0] == pytest.approx(walk.actions[2, 0], abs=1e-3)


def test_compare_scores_every_adapter_from_the_same_starts(demo: Demo) -> None:
    _, rows = demo.compare("first", ["bold"], 20, 2, 5)
    assert [row[0] for row in rows] == [FOUNDATION, "bold", "optimum"]
    starts = np.random.default_rng(5).uniform(-1, 1, 20)
    returns = demo.controllers["first"].walk("bold", starts, num_candidates=2, seed=5).returns
    assert rows[1][1:3] == [round(returns.mean(), 2), round(returns.std(), 2)]
    assert rows[1][3] == f"{returns.mean() / optimal_walks(starts).returns.mean():.1%}"


def test_pictures_show_what_they_are_given(demo: Demo) -> None:
    walks = [demo.controllers["first"].walk(FOUNDATION, np.array([s]), num_candidates=4, seed=0) for s in (-0.5, 0.5)]
    assert not np.array_equal(draw_walks([("a", walks[0])]), draw_walks([("a", walks[1])]))
    assert not np.array_equal(draw_candidates(walks[0], 0), draw_candidates(walks[0], 1))


@pytest.mark.parametrize(
    ("adapter", "start", "candidates", "message"),
    [
        ("nothing", 0.0, 4, "There is no adapter 'nothing'"),
        ("bold", 1.5, 4, r"The start must lie in \[-1, 1\]"),
        ("bold", float("nan"), 4, r"The start must lie in \[-1, 1\]"),
        ("bold", 0.0, 1000, "Candidates go from 1 to 64"),
        ("bold", 0.0, 0, "Candidates go from 1 to 64"),
    ],
)
def test_inputs_are_bounded(demo: Demo, adapter: str, start: float, candidates: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.show("first", adapter, start, candidates, 1, 0)


def test_other_bounds(demo: Demo) -> None:
    with pytest.raises(ValueError, match="Episodes go from 1 to 128"):
        demo.compare("first", [], 1e6, 1, 0)
    with pytest.raises(ValueError, match="There is no pipeline"):
        demo.show("../etc", "bold", 0, 1, 1, 0)


def test_slow_episodes_end(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmc_hub.demo.walks.TIMEOUT_SECONDS", -1.0)
    with pytest.raises(TimeoutError, match="use fewer candidates"):
        demo.show("first", "bold", 0.0, 1, 1, 0)


def test_what_does_not_fit_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the folder of at least one"):
        Demo([], [])
    with pytest.raises(ValueError, match="is not a folder"):
        Demo([tmp_path / "nothing"], [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="was trained on none of the pipelines"):
        Demo([folders / "first/pipeline"], [tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="is not a pipeline folder"):
        Controller.load(tmp_path / "empty", {})


def test_names_are_short_and_different(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/pipeline", "b/pipeline", "c/a", "plain")]
    assert list(names_of(folders)) == ["a", "b", "a-2", "plain"]


def test_space_holds_what_it_needs_and_no_more(folders: Path, tmp_path: Path) -> None:
    (folders / "first/pipeline/.env").write_text("SECRET=1")
    save_space([folders / "first/pipeline"], [folders / "bold/adapter"], tmp_path / "space")
    (folders / "first/pipeline/.env").unlink()
    names = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert {"app.py", "requirements.txt", "README.md", "pipelines/first", "adapters/bold"} <= names
    assert not any(".env" in name for name in names)
    demo = Demo.from_folder(tmp_path / "space")
    assert demo.choices("first") == [FOUNDATION, "bold"]
    assert (tmp_path / "space/requirements.txt").read_text().startswith("dmc_hub[demo]>=")
    from huggingface_hub import RepoCard

    card = RepoCard.load(tmp_path / "space/README.md")
    assert card.data.sdk == "gradio"
    assert card.data.app_file == "app.py"
