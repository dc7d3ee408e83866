"""Row 12: reward functions that fail, before training and in the middle of it, and on one of two processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmc_hub.errors import DmcHubError, RewardError
from tests.faults.cases import Case, must
from tests.faults.kills import episodes
from tests.faults.ranks import end_of, rank, start_two
from tests.trainers.test_two_processes import CASES, make_trainer

SECONDS = 2.0


def _raises(observations: Tensor, actions: Tensor) -> Tensor:
    raise KeyError("no such prompt")


def _hangs(observations: Tensor, actions: Tensor) -> Tensor:
    time.sleep(3600)
    return actions[:, 0, 0]


def _nan_at_one(observations: Tensor, actions: Tensor) -> Tensor:
    rewards = actions[:, 0, 0].clone()
    rewards[1] = float("nan")
    return rewards


FAULTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "raises": (_raises, "`reward_function` raised KeyError"),
    "hangs": (_hangs, "`reward_function` has not answered within 2 s"),
    "one too few": (lambda _, actions: actions[1:, 0, 0], "must return one reward per sample, shape"),
    "one for all": (lambda _, actions: actions.mean(), "must return one reward per sample, shape"),
    "another shape": (lambda _, actions: actions[:, 0], "must return one reward per sample, shape"),
    "complex numbers": (lambda _, actions: actions[:, 0, 0] + 1j, "must return real numbers, got torch.complex64"),
    "truth values": (lambda _, actions: actions[:, 0, 0] > 0, "must return real numbers, got torch.bool"),
    "words": (lambda _, actions: ["good"] * len(actions), "must return numbers, got list"),
    "None": (lambda _, actions: None, "must return"),
    "NaN": (_nan_at_one, "returned nan for 1 of"),
    "infinity": (lambda _, actions: actions[:, 0, 0].abs() + float("inf"), "returned inf for"),
}


def before_training(name: str, folder: Path) -> None:
    """A dry call finds it when the trainer is made."""
    function, words = FAULTS[name]
    start = time.monotonic()
    try:
        _trainer("sft", function)
    except (DmcHubError, ValueError) as error:
        must(words in str(error), str(error))
    else:
        must(False, "the trainer was made")
    must(time.monotonic() - start < SECONDS + 5, "it took too long")


def while_training(name: str, folder: Path) -> None:
    """A function that goes wrong later ends training in the same error."""
    function, words = FAULTS[name]
    calls: list[int] = []

    def later(observations: Tensor, actions: Tensor) -> Any:
        calls.append(len(actions))
        return function(observations, actions) if len(calls) > 1 else actions[:, 0, 0]

    trainer = _trainer("sft", later)
    before = {key: value.clone() for key, value in trainer.trainable_module().state_dict().items()}
    start = time.monotonic()
    try:
        trainer.train()
    except (DmcHubError, ValueError) as error:
        must(words in str(error), str(error))
    else:
        must(False, "training went on")
    must(time.monotonic() - start < SECONDS + 5, "it took too long")
    after = trainer.trainable_module().state_dict()
    must(all(torch.equal(value, after[key]) for key, value in before.items()), "the weights were changed")


def on_one_process(fault: str, method: str, folder: Path) -> None:
    """Both of two processes end with an exit code and an error that names the one, within the time limit and 5 s."""
    function, words = FAULTS[fault]

    def work() -> None:
        calls: list[int] = []

        def reward(observations: Tensor, actions: Tensor) -> Any:
            calls.append(0)
            if len(calls) == 1 or rank() == 0:
                return actions[:, 0, 0]
            (folder / "fails").write_text(str(time.time()))
            return function(observations, actions)

        try:
            _trainer(method, reward).train()
        except RewardError as error:
            (folder / f"error-{rank()}").write_text(str(error))
            raise

    codes = end_of(start_two(work, folder), 90)
    seconds = time.time() - float((folder / "fails").read_text())
    must(codes == [1, 1], f"the processes ended with {codes}", folder / "rank-0.log")
    for index in (0, 1):
        said = folder / f"error-{index}"
        must(said.is_file(), f"process {index} had another error", folder / f"rank-{index}.log")
        must("process 1: " in said.read_text() and words in said.read_text(), said.read_text())
    must(seconds < SECONDS + 5, f"it took {seconds:.1f} s")


def without_gradient(folder: Path) -> None:
    """A reward that lets no gradient through is refused where one is needed."""
    try:
        trainer = _trainer("reward_gradient", lambda _, actions: actions[:, 0, 0].detach())
        trainer.train()
    except (DmcHubError, ValueError) as error:
        must("gradient" in str(error), str(error))
    else:
        must(False, "training went on")


def _trainer(name: str, function: Callable[..., Any]) -> Any:
    trainer_type, config_type, _, settings = CASES[name]
    pipeline = make_trainer(name, episodes()).pipeline
    options: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "max_steps": 3, "use_cpu": True}
    config = config_type(**options, **settings, per_device_train_batch_size=8, reward_timeout=SECONDS)
    return trainer_type(pipeline, config, train_dataset=episodes(), reward_function=function)


def cases(quick: bool) -> Iterator[Case]:
    """Of the row."""
    for name in FAULTS:
        yield Case(12, f"{name}, before training", partial(before_training, name))
        yield Case(12, f"{name}, while training", partial(while_training, name))
    for name in ("hangs", "raises", "NaN"):
        yield Case(12, f"{name} on one of two processes", partial(on_one_process, name, "sft"))
    for method in ("ddpo_running", "reward_gradient", "nft", "dpo"):
        yield Case(12, f"raises on one of two processes, {method}", partial(on_one_process, "raises", method))
    yield Case(12, "no gradient where one is needed", without_gradient)
