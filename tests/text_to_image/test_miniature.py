"""The miniature of Table 5 of arXiv:2401.12244: its data, its words, and what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from dmc_hub.benchmarks.digits import DIGITS, OPENINGS, TONES, digit_pictures, prompt_of, tiny_stable_diffusion
from dmc_hub.benchmarks.joint import TRAINED_PROMPTS
from dmc_hub.benchmarks.joint_measures import BRIGHTEST, HELD_OUT_OPENING, Recording, digit_rewards, measures
from dmc_hub.benchmarks.joint_report import as_table, card, cost_to, summary


def test_every_word_is_one_token() -> None:
    tokenizer = tiny_stable_diffusion(0).tokenizer
    words = [*DIGITS, *TONES, *OPENINGS[1:]]
    tokens = [tokenizer(word).input_ids for word in words]
    assert all(len(each) == 3 for each in tokens)
    assert len({each[1] for each in tokens}) == len(words)
    assert tokenizer("jade seven").input_ids[1:3] == [tokens[words.index("jade")][1], tokens[7][1]]
    assert len(tokenizer(prompt_of(3, "azure", "this")).input_ids) == 5


def test_the_held_out_wording_is_in_the_data_and_not_in_training() -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    openings = [prompt.split()[0] for prompt in digit_pictures(0).prompts]
    assert 0.25 < openings.count(HELD_OUT_OPENING) / len(openings) < 0.42
    assert len(TRAINED_PROMPTS) == 20
    assert not any(prompt.startswith(HELD_OUT_OPENING) for prompt in TRAINED_PROMPTS)


def test_pictures_show_their_prompts_and_are_biased_where_no_tone_is_named() -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    data = digit_pictures(0)
    colours = torch.tensor(list(TONES.values()))
    torch.testing.assert_close(colours.mean(1), torch.full((4,), 0.6))
    means = data.images.mean((2, 3))
    nearest = torch.nn.functional.cosine_similarity(means[:, None], colours, dim=2).argmax(1)
    assert torch.equal(nearest, data.tones)
    words = [prompt.split() for prompt in data.prompts]
    assert [word[-1] for word in words] == [DIGITS[digit] for digit in data.digits.tolist()]
    named = torch.tensor([any(each in TONES for each in word) for word in words])
    assert 0.25 < named.float().mean() < 0.35
    assert 0.74 < (data.tones[~named] == 0).float().mean() < 0.84
    pairs = zip(words, data.tones.tolist(), named.tolist(), strict=True)
    assert all(word[-2] == list(TONES)[tone] for word, tone, is_named in pairs if is_named)


def test_rewards_read_the_digit_and_end_at_the_brightest_data() -> None:
    class Reader(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            digits = torch.full((len(images), 10), -9.0)
            digits[:, 3] = -0.5
            return digits, torch.zeros(len(images), 4)

    rewards = digit_rewards(Reader())  # type: ignore[arg-type]
    images = torch.stack([torch.full((3, 8, 8), value) for value in (0.1, 0.9)])
    assert rewards["text"](images, ["rose three", "four"], [{}] * 2).tolist() == [-0.5, -5]
    assert rewards["brightness"](images, ["one"] * 2, [{}] * 2).tolist() == pytest.approx([0.1, BRIGHTEST])


def test_measures_are_of_pictures_and_of_sixteen_of_them() -> None:
    images = torch.full((32, 3, 8, 8), 0.1)
    digits = torch.nn.functional.one_hot(torch.arange(32) % 10, 10).float()
    wanted = torch.cat([torch.arange(16) % 10, torch.zeros(16, dtype=torch.long)])
    tones = torch.nn.functional.one_hot(torch.cat([torch.arange(16) % 4, torch.ones(16, dtype=torch.long)]), 4).float()
    found = measures(images, digits, wanted, tones)
    assert found["accuracy"].mean() == pytest.approx((16 + 2) / 32)  # 20 and 30 end in 0
    assert found["parity_distance"].tolist() == pytest.approx([0, 0.75**0.5])  # uniform; of one tone
    assert found["brightness"].tolist() == pytest.approx([0.1] * 32)


def test_a_recording_counts_and_measures_between_steps() -> None:
    network = torch.nn.Linear(2, 2)
    was_training: list[bool] = []

    def measure() -> dict[str, float]:
        was_training.append(network.training)
        network(torch.zeros(100, 2))
        return {"loss": float(len(was_training))}

    recording = Recording(network, measure, every=2)
    reward = recording.watch(lambda images, *_: images.mean((1, 2, 3)))
    images, state, control = torch.full((16, 3, 8, 8), 0.1), TrainerState(), TrainerControl()
    reward(images, ["zero"] * 16, [{}] * 16)  # the call that tries the reward function
    recording.on_train_begin(None, state, control)
    for state.global_step in (1, 2, 3):
        network(torch.zeros(5, 2))
        assert reward(images, ["zero"] * 16, [{}] * 16).tolist() == pytest.approx([0.1] * 16)
        recording.on_step_end(None, state, control)
    recording.on_train_end(None, state, control)
    network(torch.zeros(9, 2))
    assert recording.curve == [
        {"evaluations": 0, "images": 0, "loss": 1.0},
        {"evaluations": 10, "images": 32, "loss": 2.0},
    ]
    assert (recording.evaluations, recording.images) == (15, 48)
    assert was_training == [False, False]
    assert network.training


def run_of(seed: int, shift: float) -> dict[str, Any]:
    """As of `JointMiniature.run`; `shift` moves the measures of all models alike."""

    def model(accuracy: float, parity: float, brightness: float, slope: float = 0.1) -> dict[str, Any]:
        measured = {"accuracy": accuracy + shift, "parity_distance": parity, "brightness": brightness}
        curve = [
            {
                "evaluations": 10 * i,
                "images": i,
                "parity_distance": 0.7 - slope * i,
                "brightness": 0.1 + slope * i,
            }
            for i in range(6)
        ]
        rest = {
            "judge_accuracy": 0.9,
            "tone_accuracy": 0.5,
            "denoising_loss": 0.2,
            "seconds": 1.0,
            "evaluations": 2000,
            "curve": curve,
        }
        return {**measured, **{f"{name}_error": 0.001 for name in measured}, **rest}

    models = {
        "base": model(0.5, 0.6, 0.1),
        "text only": model(0.9, 0.7, 0.1),
        "parity only": model(0.4, 0.2, 0.1),
        "brightness only": model(0.3, 0.6, 0.1),
        "joint": model(0.8, 0.3, 0.15),
        "joint, no pretraining loss": model(0.8, 0.3, 0.15),
        "parity, leave one out": model(0.4, 0.2, 0.1),
        "parity, shared credit": model(0.4, 0.2, 0.1, slope=0.05),
        "brightness, paper's recipe": model(0.4, 0.2, 0.1, slope=0.025),
    }
    return {"seed": seed, "base_steps": 1, "iterations": 4, "joint_iterations": 6, "models": models}


def test_the_summary_is_of_gains_over_the_base() -> None:
    result = summary([run_of(seed, shift) for seed, shift in enumerate((-0.02, 0.0, 0.02))])
    shares = result["share_of_gain"]["joint"]
    assert shares == pytest.approx({"accuracy": 0.75, "parity_distance": 0.75, "brightness": None})
    accuracy = result["models"]["joint"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(0.8)
    assert accuracy["high"] - accuracy["mean"] == pytest.approx(4.303 * 0.02 / 3**0.5)
    assert result["apart"]["accuracy"] == {"over_seeds": True, "in_each_seed": [True] * 3}
    assert result["apart"]["brightness"] == {"over_seeds": False, "in_each_seed": [False] * 3}
    assert "0.800 ± 0.050 | 0.300 ± 0.000 | 0.150 ± 0.000 |" in as_table(result)
    assert "| 75% | 75% | – | 2 k |" in as_table(result)
    assert "--seeds 0 1 2\n" in card(result, {})
    assert "1.5 times the samplings of a single one, which is 50% of what the 3" in card(result, {})


def test_what_a_level_costs_is_read_from_the_curves() -> None:
    """Leaving one out falls from 0.7 to 0.2 in five steps, and is half of the way there after two and a half. Shared
    credit, half as quick, ends at 0.45: exactly there, and never at 80 %."""
    curve = [{"images": i, "loss": value} for i, value in enumerate((0.6, 0.5, 0.4, 0.3))]
    assert cost_to(curve, 0.5, True, "loss", "images") == pytest.approx(1)
    assert cost_to(curve, 0.45, True, "loss", "images") == pytest.approx(1.5)
    assert cost_to(curve, 0.2, True, "loss", "images") is None
    assert cost_to(curve, 0.55, False, "loss", "images") == 0
    half, most = summary([run_of(0, 0.0)])["credit"]
    [row] = half["by_seed"]
    assert row["target"] == pytest.approx(0.45)
    assert row["cost"] == pytest.approx({"parity, leave one out": 2.5, "parity, shared credit": 5})
    assert row["reached"]
    assert half["ratio"]["mean"] == pytest.approx(2)
    assert not most["by_seed"][0]["reached"]
    assert most["ratio"]["mean"] == pytest.approx(5 / 4)
