"""The miniature of Table 5 of arXiv:2401.12244: its data, its words, and what it reports."""

from __future__ import annotations

import pytest
import torch

from dmc_hub.benchmarks.digits import DIGITS, TONES, digit_pictures, tiny_stable_diffusion
from dmc_hub.benchmarks.joint import BRIGHTEST, as_table, digit_rewards, shares_of_gain


def test_every_word_is_one_token() -> None:
    tokenizer = tiny_stable_diffusion(0).tokenizer
    words = [*DIGITS, *TONES]
    tokens = [tokenizer(word).input_ids for word in words]
    assert all(len(each) == 3 for each in tokens)
    assert len({each[1] for each in tokens}) == len(words)
    assert tokenizer("jade seven").input_ids[1:3] == [tokens[words.index("jade")][1], tokens[7][1]]


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
    named = torch.tensor([len(word) == 2 for word in words])
    assert 0.25 < named.float().mean() < 0.35
    assert 0.65 < (data.tones[~named] == 0).float().mean() < 0.75
    assert all(word[0] == list(TONES)[tone] for word, tone in zip(words, data.tones.tolist()) if len(word) == 2)


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


def test_shares_are_of_the_gain_over_the_base() -> None:
    def row(accuracy: float, parity: float, brightness: float) -> dict[str, float]:
        return {
            "accuracy": accuracy,
            "tone_accuracy": 0.5,
            "parity_distance": parity,
            "brightness": brightness,
            "seconds": 1.0,
        }

    models = {
        "base": row(0.5, 0.6, 0.1),
        "text only": row(0.9, 0.7, 0.1),
        "parity only": row(0.4, 0.2, 0.1),
        "brightness only": row(0.3, 0.6, 0.1),
        "joint": row(0.8, 0.3, 0.15),
    }
    shares = shares_of_gain(models)
    assert shares["joint"] == pytest.approx({"accuracy": 0.75, "parity_distance": 0.75})  # brightness gained nothing
    table = as_table({"models": models, "share_of_gain": shares})
    assert "| joint | 0.800 | 0.500 | 0.300 | 0.150 | 75 % | 75 % | – |" in table
