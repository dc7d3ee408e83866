"""The miniature of Table 5 of arXiv:2401.12244: its data, its words, and what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmc_hub.benchmarks.digits import DIGITS, OPENINGS, TONES, digit_pictures, prompt_of, tiny_stable_diffusion
from dmc_hub.benchmarks.joint import BRIGHTEST, HELD_OUT_OPENING, TRAINED_PROMPTS, Recording, digit_rewards, measures
from dmc_hub.benchmarks.joint_report import as_table, card, cost_to, smoothed, summary


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


def test_a_recording_counts_evaluations_and_images() -> None:
    class Reader(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(images), 10), torch.zeros(len(images), 4)

    network = torch.nn.Linear(2, 2)
    recording = Recording(network, Reader())  # type: ignore[arg-type]
    reward = recording.watch(lambda images, *_: images.mean((1, 2, 3)))
    images = torch.full((16, 3, 8, 8), 0.1)
    network(torch.zeros(7, 2))
    recording.start()
    for _ in range(2):
        network(torch.zeros(5, 2))
        assert reward(images, ["zero"] * 16, [{}] * 16).tolist() == pytest.approx([0.1] * 16)
    recording.stop()
    network(torch.zeros(9, 2))
    assert [(point["evaluations"], point["images"]) for point in recording.curve] == [(5, 16), (10, 32)]
    assert recording.curve[0]["accuracy"] == 1  # the digit that the prompt ends with
    assert recording.evaluations == 10


def run_of(seed: int, shift: float) -> dict[str, Any]:
    """As of `JointMiniature.run`; `shift` moves the measures of all models alike."""

    def model(accuracy: float, parity: float, brightness: float, slope: float = 0.1) -> dict[str, Any]:
        measured = {"accuracy": accuracy + shift, "parity_distance": parity, "brightness": brightness}
        curve = [
            {"evaluations": 10 * i, "images": i, "parity_distance": 0.7 - slope * i, "brightness": 0.1 + slope * i}
            for i in range(1, 6)
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
    return {"seed": seed, "base_steps": 1, "models": models}


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


def test_what_a_level_costs_is_read_from_smoothed_curves() -> None:
    """Leaving one out goes from 0.6 to the mean of 0.4, 0.3 and 0.2, and is half of the way
    there, at 0.4, with its fourth batch, averaged over 0.5, 0.4 and 0.3. Shared credit, half as quick, ends at the mean
    of 0.55, 0.5 and 0.45."""
    curve = [{"images": i, "loss": value} for i, value in enumerate((0.6, 0.5, 0.4, 0.3))]
    means = [point["loss"] for point in smoothed(curve, "loss")]
    assert means == pytest.approx([0.6, 0.55, 0.5, 0.4])
    assert cost_to(curve, 0.5, True, "loss", "images") == 1
    assert cost_to(curve, 0.2, True, "loss", "images") is None
    assert cost_to(curve, 0.55, False, "loss", "images") == 0
    found = summary([run_of(0, 0.0)])["credit"]
    [row] = found["by_seed"]
    assert row["target"] == pytest.approx((0.6 + 0.3) / 2)
    assert row["images"] == {"parity, leave one out": 4, "parity, shared credit": 5}
    assert not row["reached"]
    assert found["ratio"]["mean"] == pytest.approx(5 / 4)
