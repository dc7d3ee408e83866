"""Distribution-level rewards, several rewards at once, tasks in turn and the pretraining loss."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dmc_hub.image_rewards import DistributionReward, statistical_parity
from dmc_hub.joint_reward import JointReward, min_norm_weights, of_its_task
from dmc_hub.text_to_image import PromptTasks, TextToImagePolicy
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.joint import JointConfig

MakePipeline = Callable[[str], Any]
CLASSES = torch.eye(3)[[0, 0, 0, 1]]
SMALL: dict[str, Any] = {
    "logging_steps": 1,
    "num_inference_steps": 3,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
    "group_size": 4,
    "lr_scheduler_type": "constant",
}


def classify(images: Tensor, *_: Any) -> Tensor:
    """The images are their own class probabilities."""
    return images


def call(reward: Any, images: Tensor, prompts: list[str] | None = None, metadata: Any = None) -> list[float]:
    prompts = ["a"] * len(images) if prompts is None else prompts
    values: Tensor = reward(images, prompts, [{}] * len(images) if metadata is None else metadata)
    return values.tolist()


def test_shared_parity_is_equation_12() -> None:
    """Frequencies (3/4, 1/4, 0) are at (5/12, -1/12, -1/3) from uniform: sqrt(25 + 1 + 16) / 12."""
    assert call(statistical_parity(classify, credit="shared"), CLASSES) == pytest.approx([-(42**0.5) / 12] * 4)
    exact = statistical_parity(classify, [0.75, 0.25, 0.0], credit="shared")
    assert call(exact, CLASSES) == pytest.approx([0] * 4, abs=1e-7)


def test_leaving_one_out_credits_the_rare() -> None:
    """Without an image of class 0: (2/3, 1/3, 0), sqrt(2) / 3 from uniform; without the one of class 1: (1, 0, 0)."""
    whole, common, rare = 42**0.5 / 12, 2**0.5 / 3, 6**0.5 / 3
    expected = [common - whole] * 3 + [rare - whole]
    assert call(statistical_parity(classify), CLASSES) == pytest.approx(expected)
    assert expected[0] < 0 < expected[3]


def test_groups_are_apart_and_a_lone_image_has_no_credit() -> None:
    reward = statistical_parity(classify, group_by=lambda prompt, metadata: metadata["group"])
    groups = [{"group": name} for name in ("x", "y", "x", "lone", "y")]
    images = torch.eye(3)[[0, 0, 1, 2, 0]]
    values = call(reward, images, ["p"] * 5, groups)
    assert values[0] == pytest.approx(values[2])  # one of each class: either is as good
    assert values[0] > 0
    assert (values[1], values[3], values[4]) == (0, 0, 0)


def test_any_statistic_has_a_distance() -> None:
    """Mean brightness to 1/2 as a squared error: 0.3 for (0.2, 0.4); without the first 0.4, without the second 0.2."""
    reward = DistributionReward(lambda images, *_: images[:, :1], lambda mean: (mean[..., 0] - 0.5) ** 2)
    assert call(reward, torch.tensor([[0.2, 0.0], [0.4, 0.0]])) == pytest.approx([0.01 - 0.04, 0.09 - 0.04])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: statistical_parity(classify, [0.5, 0.6]), "a histogram that adds up to 1"),
        (lambda: DistributionReward(classify, torch.norm, credit="mine"), "`credit` must be leave_one_out or shared"),  # type: ignore[arg-type]
        (lambda: call(DistributionReward(lambda *_: torch.zeros(3), torch.norm), CLASSES), "must return 4 vectors"),
        (lambda: JointReward({}), "`weights` must name some of the rewards"),
        (lambda: JointReward({"a": call}, weights={"b": 1.0}), r"got \['b'\]"),
        (lambda: JointReward({"a": call}, normalization="std"), "`normalization` must be one of prompt, group"),  # type: ignore[arg-type]
        (lambda: JointReward({"a": call}, weighting="mgda"), "`weighting` must be one of fixed, min_norm"),  # type: ignore[arg-type]
        (lambda: JointReward({"a": call}, normalization="moving", moving_decay=1.0), "`moving_decay` must lie in"),
        (lambda: call(JointReward({"a": lambda *_: [1.0]}), CLASSES), "The reward 'a' must return 4 numbers"),
        (lambda: JointConfig(max_steps=1, pretraining_coefficient=1.0), "`pretraining_coefficient` must stay 0"),
    ],
)
def test_rewards_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Several rewards


def column(index: int, scale: float = 1.0, offset: float = 0.0) -> Callable[..., Tensor]:
    return lambda images, *_: scale * images[:, index] + offset


VALUES = torch.tensor([[1.0, 4.0], [3.0, 4.0], [0.0, 1.0], [0.0, 7.0]])
PROMPTS = ["p", "p", "q", "q"]


def test_each_reward_is_normalised_before_it_is_weighted() -> None:
    """Centred by prompt the columns are (-1, 1, 0, 0) and (0, 0, -3, 3), with std sqrt(1/2) and sqrt(9/2)."""
    reward = JointReward({"a": column(0, 1000.0, 5.0), "b": column(1)}, weights={"b": 2.0})
    root = 2**0.5
    assert call(reward, VALUES, PROMPTS) == pytest.approx([-root, root, -2 * root, 2 * root], rel=1e-4)
    assert reward.means == {"a": pytest.approx(1005.0), "b": pytest.approx(4.0)}


def test_normalisation_by_the_batch_keeps_what_separates_prompts() -> None:
    reward = JointReward({"b": column(1)}, normalization="batch")
    assert call(reward, VALUES, PROMPTS) == pytest.approx([0, 0, -(2**0.5), 2**0.5])
    plain = JointReward({"a": column(0), "b": column(1)}, weights={"a": 3.0}, normalization="none")
    assert call(plain, VALUES, PROMPTS) == pytest.approx([7, 13, 1, 7])


def test_the_running_scale_is_of_the_whole_run_and_resumes() -> None:
    reward = JointReward({"a": column(0)}, normalization="running")
    call(reward, VALUES, PROMPTS)
    state = reward.state()
    second = call(reward, 3 * VALUES, PROMPTS)
    std = ((2 + 18) / 8) ** 0.5
    assert second == pytest.approx([-3 / std, 3 / std, 0, 0])
    resumed = JointReward({"a": column(0)}, normalization="running")
    resumed.load_state(state)
    assert call(resumed, 3 * VALUES, PROMPTS) == second


def test_the_moving_scale_forgets() -> None:
    """Sums of squares 2 and 18 over 4 images each, the older ones times 0.5: (1 + 18) / (2 + 4)."""
    reward = JointReward({"a": column(0)}, normalization="moving", moving_decay=0.5)
    call(reward, VALUES, PROMPTS)
    std = (19 / 6) ** 0.5
    assert call(reward, 3 * VALUES, PROMPTS) == pytest.approx([-3 / std, 3 / std, 0, 0])


def test_each_group_has_its_own_scale() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [65.0]])
    assert call(JointReward({"a": column(0)}, normalization="group"), values, PROMPTS) == pytest.approx([-1, 1, -1, 1])
    pooled = (2 * (1 + 30**2) / 4) ** 0.5
    expected = [-1 / pooled, 1 / pooled, -30 / pooled, 30 / pooled]
    assert call(JointReward({"a": column(0)}), values, PROMPTS) == pytest.approx(expected)


def test_the_least_norm_of_two_vectors_is_where_they_are_at_right_angles_to_their_difference() -> None:
    """`(|b|^2 - a b) / |a - b|^2` of the first, cut to [0, 1] (Algorithm 1 of Sener & Koltun, 2018)."""
    for a, b in (([1.0, 0.0], [1.0, 2.0]), ([1.0, 0.0], [-0.5, 1.0]), ([3.0, 0.0], [0.0, 1.0])):
        first, second = torch.tensor(a), torch.tensor(b)
        share = float(((second - first) @ second / (first - second).pow(2).sum()).clamp(0, 1))
        stacked = torch.stack([first, second]).double()
        assert min_norm_weights(stacked @ stacked.T).tolist() == pytest.approx([share, 1 - share], abs=1e-6)
    axes = torch.diag(
        torch.tensor([1.0, 4.0, 0.0, 2.0], dtype=torch.float64)
    )  # weights as 1 / length^2; 0 wants nothing
    assert min_norm_weights(axes).tolist() == pytest.approx([4 / 7, 1 / 7, 0, 2 / 7], abs=1e-2)


def test_a_reward_that_the_others_oppose_counts_for_more() -> None:
    """Two equal columns and one against them: half of the weight is on the one, and a fixed weight still multiplies."""
    images = torch.tensor([[1.0, -1.0], [-1.0, 0.5], [2.0, 1.0], [-2.0, -0.5]])
    rewards = {"a": column(0), "same": column(0, 5.0), "other": column(1, -1.0)}
    reward = JointReward(rewards, normalization="batch", weighting="min_norm", weights={"other": 2.0})
    total = call(reward, images)
    weights = reward.metrics()
    assert weights["weight_a"] + weights["weight_same"] + weights["weight_other"] == pytest.approx(3)
    assert weights["weight_other"] == pytest.approx(1.5, abs=0.02)
    normal = [column / column.std(correction=0) for column in images.T]
    expected = 1.5 * normal[0] - 2 * 1.5 * normal[1]
    assert total == pytest.approx(expected.tolist(), abs=0.06)


def test_equal_rewards_say_nothing() -> None:
    reward = JointReward({"a": lambda images, *_: torch.full((len(images),), 0.1)})
    assert call(reward, torch.zeros(3, 1)) == [0, 0, 0]


def test_of_its_task_each_reward_sees_its_own_prompts_only() -> None:
    seen: dict[str, list[str]] = {}

    def named(name: str, index: int) -> Callable[..., Tensor]:
        def reward(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
            seen[name] = prompts
            return images[:, index]

        return reward

    reward = JointReward({"x": named("x", 0), "y": named("y", 1), "z": named("z", 0)}, applies=of_its_task)
    values = call(reward, VALUES, PROMPTS, [{"task": name} for name in "xxyy"])
    assert seen == {"x": ["p", "p"], "y": ["q", "q"]}
    assert values == pytest.approx([-1, 1, -1, 1])
    assert set(reward.means) == {"x", "y"}


TWO_PROCESSES = """
import sys, torch
torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
from dmc_hub.image_rewards import statistical_parity
from dmc_hub.joint_reward import JointReward, of_its_task
mine = slice(0, 3) if sys.argv[2] == "0" else slice(3, 4)
images = torch.eye(3)[[0, 0, 0, 1]][mine]
prompts, facts = ["a"] * len(images), [{}] * len(images)
values = [statistical_parity(lambda i, *_: i)(images, prompts, facts)]
values += [JointReward({"r": lambda i, *_: i[:, 1]}, normalization="batch")(images, prompts, facts)]
only_second = [{"task": "x" if sys.argv[2] == "1" else "y"}] * len(images)
values += [JointReward({"x": lambda i, *_: i[:, 1]}, applies=of_its_task)(images, prompts, only_second)]
rewards = {"a": lambda i, *_: i[:, 1], "b": lambda i, *_: i[:, 0] + 3 * i[:, 1]}
values += [JointReward(rewards, normalization="batch", weighting="min_norm")(images, prompts, facts)]
torch.save(values, sys.argv[3])
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, f"file://{tmp_path}/store", str(rank), str(tmp_path / f"{rank}.pt")]
        )
        for rank in range(2)
    ]
    assert [process.wait(100) for process in ranks] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    parity, batch, lone, weighted = (torch.cat(pair) for pair in zip(*parts))
    assert parity.tolist() == pytest.approx(call(statistical_parity(classify), CLASSES))
    whole = JointReward({"r": column(1)}, normalization="batch")
    assert batch.tolist() == pytest.approx(call(whole, CLASSES))
    rewards = {"a": column(1), "b": lambda images, *_: images[:, 0] + 3 * images[:, 1]}
    least = JointReward(rewards, normalization="batch", weighting="min_norm")
    assert weighted.tolist() == pytest.approx(call(least, CLASSES), rel=1e-5)
    assert not lone.any()  # a process without images for a reward, and one image for it elsewhere


# In training


def contrast(images: Tensor, *_: Any) -> Tensor:
    return images.std((1, 2, 3))


def redness(images: Tensor, *_: Any) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def make_trainer(make_pipeline: MakePipeline, data: Any, reward: Any, **options: Any) -> DDPOTrainer:
    extra = {name: options.pop(name) for name in ("pretraining_dataset",) if name in options}
    policy = TextToImagePolicy(make_pipeline("sd_v"), training_guidance_scale=options.pop("guidance", None))
    config = DDPOConfig(**{**SMALL, "max_steps": 1, **options})
    return DDPOTrainer(policy, config, train_dataset=data, reward_function=reward, peft_config=LoraConfig(r=2), **extra)


def test_tasks_take_turns_or_share_a_batch(make_pipeline: MakePipeline) -> None:
    prompts = {"red": ["a", "b"], "contrast": ["c"]}
    rewards = {"red": redness, "contrast": contrast}
    trainer = make_trainer(make_pipeline, PromptTasks(prompts), JointReward(rewards, applies=of_its_task), max_steps=4)
    trainer.train()
    logged = [sorted(key for key in row if key.startswith("reward_")) for row in trainer.history[:4]]
    assert logged == [["reward_red"], ["reward_contrast"]] * 2
    together = make_trainer(make_pipeline, PromptTasks(prompts, in_turn=False), JointReward(rewards))
    together.train()
    assert {"reward_red", "reward_contrast"} <= set(together.history[0])
    with pytest.raises(ValueError, match="The 2 conditions of one draw must be a multiple of the 3 tasks"):
        make_trainer(make_pipeline, PromptTasks({**prompts, "third": ["d"]}, in_turn=False), redness).train()


def test_a_joint_run_resumes_bit_for_bit(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        reward = JointReward({"red": redness, "contrast": contrast}, applies=of_its_task, normalization="running")
        data = PromptTasks({"red": ["a", "b"], "contrast": ["c"]})
        options = {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(make_pipeline, data, reward, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume or None)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" in name}

    whole = run("whole", 5)
    run("parts", 3)
    resumed = run("parts", 5, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def pairs() -> list[dict[str, Any]]:
    pictures = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"prompt": str(index), "image": picture} for index, picture in enumerate(pictures)]


def gradients(trainer: DDPOTrainer) -> dict[str, Tensor]:
    """Of the first optimizer step, whatever is accumulated."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    trainer.args.max_grad_norm = 0.0
    trainer.args.max_steps = 1
    original = trainer._get_grad_norm

    def kept(*args: Any, **kwargs: Any) -> Any:
        keep()
        return original(*args, **kwargs)

    trainer._get_grad_norm = kept  # type: ignore[method-assign]
    trainer.train()
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_pretraining_loss_adds_its_gradient(make_pipeline: MakePipeline, accumulation: int) -> None:
    """Twice the weight adds twice the gradient, and training with guidance changes nothing in it."""
    found = [
        gradients(
            make_trainer(
                make_pipeline,
                ["a"],
                redness,
                pretraining_dataset=pairs(),
                pretraining_coefficient=weight,
                gradient_accumulation_steps=accumulation,
            )
        )
        for weight in (0.0, 1.0, 2.0)
    ]
    names = [name for name in found[0] if "lora_B" in name]
    added = [torch.cat([(each[name] - found[0][name]).flatten() for name in names]) for each in found[1:]]
    assert added[0].norm() > 1e-3
    torch.testing.assert_close(added[1], 2 * added[0], rtol=1e-3, atol=1e-5)


def test_the_pretraining_loss_is_the_mean_over_the_micro_steps(make_pipeline: MakePipeline) -> None:
    trainer = make_trainer(make_pipeline, ["a"], redness, pretraining_dataset=pairs(), pretraining_coefficient=1.0)
    losses, expected = [], {name: 0.0 for name, p in trainer.model.named_parameters() if "lora_B" in name}
    for micro_step in range(2):
        trainer.micro_step = micro_step
        loss = trainer._pretraining_loss(trainer.generator("pretraining"))
        losses.append(loss.item())
        trainer.model.zero_grad()
        loss.backward()
        expected = {n: expected[n] + p.grad / 2 for n, p in trainer.model.named_parameters() if "lora_B" in n}
    options = {"pretraining_coefficient": 1e4, "gradient_accumulation_steps": 2}  # the rest disappears beside it
    accumulated = make_trainer(make_pipeline, ["a"], redness, pretraining_dataset=pairs(), **options)
    found = gradients(accumulated)
    for name, value in expected.items():
        torch.testing.assert_close(found[name] / 1e4, value, rtol=1e-2, atol=2e-3)
    assert accumulated.history[0]["pretraining_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_pretraining_loss_is_without_guidance_and_needs_images(make_pipeline: MakePipeline) -> None:
    losses = []
    for guidance in (None, 3.0):
        trainer = make_trainer(make_pipeline, pairs(), redness, guidance=guidance, pretraining_coefficient=1.0)
        losses.append(trainer._pretraining_loss(trainer.generator("pretraining")).item())
        assert trainer.pipeline.training_guidance_scale == (guidance or 1.0)
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="needs data with clean samples: pass `pretraining_dataset`"):
        make_trainer(make_pipeline, ["a"], redness, pretraining_coefficient=1.0)
