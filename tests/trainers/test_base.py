"""The trainer base, on a real pipeline of a tiny network: resume, faults, LoRA, EMA, two processes.

Run as a script, this file is also the program that the tests kill and that they start on two processes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import ModelMixin
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dmc_hub import checkpoint
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.control_pipeline import ControlPipeline
from dmc_hub.trainers.base import DiffusionConfig, DiffusionTrainer, NonFiniteLossError, SkippedStepWarning

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["first", "last"]}


class TinyDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.last = nn.Linear(width, 2)
        self.gradient_checkpointing = False
        self.num_recomputed = 0

    def _features(self, x: Tensor) -> Tensor:
        self.num_recomputed += 1
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self.last(recompute(self._features, x, use_reentrant=False))
        return self.last(self._features(x))


class TinyNormalizer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))


class TinyPipeline(ControlPipeline):
    def __init__(self, denoiser: TinyDenoiser, scheduler: DDPMScheduler, normalizer: TinyNormalizer) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, normalizer=normalizer)


class RotationTrainer(DiffusionTrainer):
    """Learns a rotation; uses every source of randomness and of state that a checkpoint has to keep."""

    nan_at: int = -1
    nan_from: int = 10**9

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running = torch.zeros(2)  # as a target network would, depends on all steps before
        self.seen: dict[int, Tensor] = {}

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        batch = torch.randn(self.args.per_device_train_batch_size, 2, generator=generator)
        self.seen[self.micro_step] = batch
        return {"x": batch}

    make_eval_batch = make_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        x = inputs["x"]
        noise = torch.randn(x.shape)
        if self.micro_step >= 0:  # not in an evaluation
            noise += random.random() + np.random.uniform()  # noqa: NPY002
        own_noise = torch.randn(x.shape, generator=self.generator("noise"))
        target = x.roll(1, dims=1) * torch.tensor([1.0, -1.0])
        # Through the pipeline, not through `model`: gradients must be averaged all the same.
        error = self.pipeline.denoiser(x + 0.01 * noise + 0.01 * own_noise) - target - 0.1 * self.running
        if self.micro_step >= 0:
            self.running = 0.9 * self.running + 0.1 * x.mean(dim=0)
        self.log_metric("error", error.abs())
        loss = error.square().mean()
        is_broken = self.micro_step == self.nan_at or self.micro_step >= self.nan_from
        return loss * float("nan") if is_broken else loss

    def extra_state(self) -> dict[str, Tensor]:
        return {"running": self.running}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.running = state["running"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


class SignalAt(StopAt):
    number = signal.SIGINT

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def make_pipeline(seed: int = 0) -> TinyPipeline:
    torch.manual_seed(seed)
    return TinyPipeline(TinyDenoiser(), DDPMScheduler(), TinyNormalizer())


def make_config(output_dir: Path | None = None, **options: Any) -> DiffusionConfig:
    saving = {} if output_dir is None else {"output_dir": str(output_dir), "save_strategy": "steps", "save_steps": 2}
    defaults = {
        "max_steps": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "logging_steps": 4,
    }
    return DiffusionConfig(**{**defaults, "per_device_train_batch_size": 4, **saving, **options})


def make_trainer(
    output_dir: Path | None = None, *, lora: bool = False, callbacks: Any = (), **options: Any
) -> RotationTrainer:
    return RotationTrainer(
        make_pipeline(),
        make_config(output_dir, **options),
        train_dataset=None,
        peft_config=LoraConfig(**LORA) if lora else None,
        callbacks=callbacks,
    )


def state_of(trainer: DiffusionTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.pipeline.denoiser.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


# ---- Resume ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": True},
        {"ema_decay": 0.9},
        {"lora": True, "ema_decay": 0.9, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
        {"gradient_accumulation_steps": 2, "optim": "sgd", "optim_args": "momentum=0.9"},
        {"bf16": True, "max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_resumed_run_equals_uninterrupted(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = make_trainer(**options)
    initial = state_of(whole)
    whole.train()
    assert differs(initial, state_of(whole))

    make_trainer(tmp_path, callbacks=[StopAt(5)], **options).train()  # the newest checkpoint is that of step 4
    resumed = make_trainer(tmp_path, **options)
    random.seed(1)  # the state of the process must not matter
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole), state_of(resumed))
    assert_same({"running": whole.running}, {"running": resumed.running})
    assert min(resumed.seen) == 4 * options.get("gradient_accumulation_steps", 1)
    assert whole.history[1]["loss"] == resumed.history[1]["loss"]
    assert whole.history[1]["error"] == resumed.history[1]["error"]


def test_a_run_can_be_prolonged(tmp_path: Path) -> None:
    whole = make_trainer(max_steps=8)
    whole.train()
    make_trainer(tmp_path, max_steps=3).train()
    resumed = make_trainer(tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(state_of(whole), state_of(resumed))
    finished = make_trainer(tmp_path, max_steps=8)
    finished.train(resume_from_checkpoint=True)  # nothing is left to do
    assert_same(state_of(whole), state_of(finished))


def test_training_is_a_function_of_the_seed() -> None:
    first, second, other = make_trainer(), make_trainer(), make_trainer(seed=1)
    torch.randn(3)
    for trainer in (first, second, other):
        trainer.train()
    assert_same(state_of(first), state_of(second))
    assert differs(state_of(first), state_of(other))


def test_batches_are_a_function_of_the_step() -> None:
    trainer = make_trainer(max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert sorted(trainer.seen) == list(range(6))
    assert len({tuple(batch.flatten().tolist()) for batch in trainer.seen.values()}) == 6
    again = torch.randn(4, 2, generator=trainer._seeded("batch", 3))
    assert torch.equal(again, trainer.seen[3])
    trainer.micro_step = 1
    draws = [torch.randn((), generator=trainer.generator(purpose)).item() for purpose in ("a", "a", "b")]
    assert draws[0] == draws[1] != draws[2]


def test_gradient_accumulation_equals_one_large_batch() -> None:
    class Fixed(RotationTrainer):
        def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
            data = torch.arange(8.0).reshape(4, 2)
            size = self.args.per_device_train_batch_size
            start = size * (self.micro_step % (4 // size))
            return {"x": data[start : start + size]}

        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            return self.pipeline.denoiser(inputs["x"]).square().mean()

    results = []
    for size, accumulation in ((4, 1), (2, 2)):
        config = make_config(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer = Fixed(make_pipeline(), config, train_dataset=None)
        trainer.train()
        results.append((state_of(trainer), trainer.history[0]["loss"]))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][name], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


# ---- Checkpoint folders ----------------------------------------------------------------------------------


def test_checkpoint_is_what_diffusers_reads(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, ema_decay=0.5)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    manifest = checkpoint.verify(folder)
    assert manifest.metadata["step"] == 2
    assert not [name for name in manifest.files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    last = TinyDenoiser.from_pretrained(folder / "denoiser").state_dict()
    assert differs(last, state_of(trainer))  # the trained pipeline holds the moving average
    # Decay of the first two updates of diffusers' EMAModel: 0, then min(2 / 11, 0.5).
    one = make_trainer(max_steps=1)
    one.train()
    for name, averaged in state_of(trainer).items():
        expected = state_of(one)[name] * (2 / 11) + last[name] * (9 / 11)
        torch.testing.assert_close(averaged, expected)


def test_lora_checkpoint_is_what_peft_and_the_pipeline_read(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora=True, max_steps=2)
    base = make_pipeline().denoiser
    trainer.train()
    x = torch.randn(3, 2)
    expected = trainer.pipeline.denoiser(x)
    assert not torch.equal(expected, base(x))
    fresh = make_pipeline()
    fresh.load_lora_weights(tmp_path / "checkpoint-2")
    assert torch.equal(fresh.denoiser(x), expected)
    wrapped = PeftModel.from_pretrained(make_pipeline().denoiser, str(tmp_path / "checkpoint-2"))
    assert torch.equal(wrapped(x), expected)
    with trainer.pipeline.lora_disabled():
        assert torch.equal(trainer.pipeline.denoiser(x), base(x))


def test_corrupt_newest_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    whole = make_trainer()
    whole.train()
    make_trainer(tmp_path, callbacks=[StopAt(6)]).train()
    damaged = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    resumed = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"checkpoint-6.*optimizer\.safetensors.*was changed"):
        resumed.train(resume_from_checkpoint=True)
    assert min(resumed.seen) == 4
    assert_same(state_of(whole), state_of(resumed))
    checkpoint.verify(tmp_path / "checkpoint-6")  # written anew on the way


def test_corrupt_or_foreign_checkpoints_change_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path / "a", max_steps=4).train()
    trainer = make_trainer(tmp_path / "b", lora=True)
    before = state_of(trainer)
    with pytest.raises(CheckpointError, match="base_fingerprint None"):
        trainer.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-4")
    (tmp_path / "a" / "checkpoint-4" / "scheduler.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler\.json.*missing"):
        trainer.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"manifest\.json.*missing"):
        trainer.train(resume_from_checkpoint=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no usable checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(before, state_of(trainer))
    wide = TinyPipeline(TinyDenoiser(width=9), DDPMScheduler(), TinyNormalizer())
    other = RotationTrainer(wide, make_config(tmp_path / "c"), train_dataset=None)
    with pytest.raises(CheckpointError, match=r"first\.weight has shape \(8, 2\), the model's has \(9, 2\)"):
        other.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(ValueError, match=r"already holds checkpoint-4"):
        make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match=r"also holds checkpoint-4"):
        make_trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.01, not 0\.5"):
        make_trainer(tmp_path, learning_rate=0.5).train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="`seed` from 42 to 1"):
        make_trainer(tmp_path, seed=1).train(resume_from_checkpoint=True)


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_total_limit=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_without_output_dir_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer().train()
    assert list(tmp_path.iterdir()) == []


# ---- Faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_steps_in_a_row_end_the_run(where: str, tmp_path: Path) -> None:
    class Exploding(RotationTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            loss = super().compute_loss(model, inputs)
            if self.micro_step >= 5 and where == "gradient":  # d sqrt(u) / du at 0 is infinite, the loss is finite
                return loss + (0 * self.pipeline.denoiser.first.weight).abs().sum().sqrt()
            return loss

    expected = make_trainer(max_steps=5)
    expected.train()
    trainer = Exploding(make_pipeline(), make_config(tmp_path), train_dataset=None)
    trainer.nan_from = 5 if where == "loss" else 10**9
    dump = tmp_path / "non-finite" / "step-8-process-0.safetensors"
    message = rf"Step 8: the loss is .* 3 such steps in a row \(`max_skipped_steps`\).* The last batch is in `{dump}`"
    with (
        pytest.warns(SkippedStepWarning, match=r"Step [67]: the loss is .* is skipped"),
        pytest.raises(NonFiniteLossError, match=message),
    ):
        trainer.train()
    assert_same(state_of(expected), state_of(trainer))
    assert torch.equal(checkpoint.load_tensors(dump)["x"], trainer.seen[7])


def test_one_non_finite_step_is_skipped_and_logged_as_nan() -> None:
    trainer, expected = make_trainer(logging_steps=1), make_trainer(logging_steps=1)
    trainer.nan_at = 5
    states: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            states.append(state_of(trainer))

    trainer.add_callback(Watch())
    with pytest.warns(SkippedStepWarning, match="Step 6: the loss is nan"):
        trainer.train()
    expected.train()
    assert_same(states[4], states[5])
    assert differs(states[5], states[6])
    losses = [row["loss"] for row in trainer.history if "loss" in row]
    assert losses[:5] == [row["loss"] for row in expected.history if "loss" in row][:5]
    assert np.isnan(losses[5])
    assert np.isfinite(losses[6:]).all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    whole = make_trainer()
    whole.train()
    callback = SignalAt(3)
    callback.number = number
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="Stopped at step 4 of 8"):
        make_trainer(tmp_path, callbacks=[callback], save_steps=100).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "`max_steps` must be positive, got 0"),
        ({"ema_decay": 1.0}, "`ema_decay` must be between 0 and 1, got 1.0"),
        ({"save_strategy": "steps"}, "`output_dir` is None"),
        ({"logging_strategy": "epoch"}, "`logging_strategy` must be 'steps'"),
        ({"push_to_hub": True, "output_dir": "x"}, "`push_to_hub` must be False"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**options)


# ---- What is trained -------------------------------------------------------------------------------------


def test_one_lora_goes_through_several_trainers() -> None:
    pipeline = make_pipeline()
    base = {name: tensor.clone() for name, tensor in pipeline.denoiser.state_dict().items()}
    for lora in (LoraConfig(**LORA), LoraConfig(**LORA), None):
        trainer = RotationTrainer(pipeline, make_config(max_steps=2), train_dataset=None, peft_config=lora)
        before = state_of(trainer)
        trainer.train()
        after = state_of(trainer)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed
        assert all(".lora_" in name for name in changed)
    assert pipeline.lora_names == ["default"]
    for name, tensor in base.items():
        layer, parameter = name.rsplit(".", 1)
        assert torch.equal(tensor, after[f"{layer}.base_layer.{parameter}"])


def test_other_components_are_frozen() -> None:
    pipeline = make_pipeline()
    pipeline.normalizer.train()
    trainer = RotationTrainer(pipeline, make_config(max_steps=1), train_dataset=None)
    assert not pipeline.normalizer.training
    assert not pipeline.normalizer.mean.requires_grad
    trainer.train()
    assert not pipeline.denoiser.training


def test_another_component_can_be_trained(tmp_path: Path) -> None:
    class CentreTrainer(RotationTrainer):
        def trainable_module(self) -> nn.Module:
            return self.pipeline.normalizer

        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            return (self.pipeline.normalizer.mean - 1).square().sum()

    pipeline = make_pipeline()
    before = pipeline.denoiser.first.weight.clone()
    trainer = CentreTrainer(pipeline, make_config(tmp_path, max_steps=100, learning_rate=0.1), train_dataset=None)
    trainer.train()
    torch.testing.assert_close(pipeline.normalizer.mean.detach(), torch.ones(2), atol=0.05, rtol=0)
    assert torch.equal(before, pipeline.denoiser.first.weight)
    saved = TinyNormalizer.from_pretrained(tmp_path / "checkpoint-100" / "normalizer")
    assert torch.equal(saved.mean, pipeline.normalizer.mean)


def test_it_learns() -> None:
    trainer = make_trainer(max_steps=300, learning_rate=0.02)
    trainer.train()
    assert trainer.history[-2]["loss"] < 0.1 * trainer.history[0]["loss"]


def test_gradient_checkpointing_gives_the_same_weights() -> None:
    plain, saving = make_trainer(max_steps=2), make_trainer(max_steps=2, activation_checkpointing=True)
    plain.train()
    saving.train()
    assert_same(state_of(plain), state_of(saving))
    assert saving.pipeline.denoiser.num_recomputed == 2 * plain.pipeline.denoiser.num_recomputed
    assert saving.args.activation_checkpointing


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    class Worsening(RotationTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_score"] = -abs(self.state.global_step - 4.0)  # best at step 4
            return metrics

    config = make_config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        save_total_limit=1,
        ema_decay=0.9,
    )
    trainer = Worsening(make_pipeline(), config, train_dataset=None, eval_dataset="unused")
    trainer.train()
    four = make_trainer(max_steps=4, ema_decay=0.9)
    four.train()
    assert_same(state_of(four), state_of(trainer))


def test_evaluation_leaves_training_alone() -> None:
    plain = make_trainer(ema_decay=0.9)
    plain.train()
    evaluated = RotationTrainer(
        make_pipeline(),
        make_config(eval_strategy="steps", eval_steps=3, ema_decay=0.9, num_eval_batches=2),
        train_dataset=None,
        eval_dataset="unused",
    )
    evaluated.train()
    assert_same(state_of(plain), state_of(evaluated))
    losses = [row for row in evaluated.history if "eval_loss" in row]
    assert [row["step"] for row in losses] == [3, 6, 8]
    assert set(losses[0]) == {"eval_loss", "eval_error", "step"}
    assert [row["error"] for row in evaluated.history if "error" in row] == [
        row["error"] for row in plain.history if "error" in row
    ]
    assert min(evaluated.seen) == -2


def test_metrics_are_means_over_the_logged_steps() -> None:
    class Counting(RotationTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            self.log_metric("step_number", float(self.micro_step))
            return super().compute_loss(model, inputs)

    trainer = Counting(make_pipeline(), make_config(), train_dataset=None)
    trainer.train()
    assert [row["step_number"] for row in trainer.history if "step_number" in row] == [1.5, 5.5]
    assert "epoch" not in trainer.history[0]


def test_hook_runs_once_per_optimizer_step() -> None:
    class Counting(RotationTrainer):
        steps: tuple[int, ...] = ()

        def after_optimizer_step(self) -> None:
            self.steps += (self.state.global_step,)

    trainer = Counting(make_pipeline(), make_config(max_steps=3, gradient_accumulation_steps=2), train_dataset=None)
    trainer.train()
    assert trainer.steps == (1, 2, 3)


def test_progress_shows_steps_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(disable_tqdm=False).train()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "8/8" in captured.err
    assert "loss=" in captured.err
    make_trainer(disable_tqdm=True).train()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_trainers_built_together_train_in_any_order() -> None:
    alone = make_trainer()
    alone.train()
    first, second = make_trainer(), make_trainer(seed=7)
    second.train()
    first.train()
    assert_same(state_of(alone), state_of(first))


# ---- Other processes -------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "lora": True,
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "save_total_limit": 2,
}


@pytest.mark.parametrize("size", [0.01, 1.0, 50.0])
def test_gradients_are_clipped_as_torch_clips_them(size: float) -> None:
    trainer = make_trainer(max_grad_norm=1.0)
    torch.manual_seed(3)
    parameters = list(trainer.model.parameters())
    for parameter in parameters:
        parameter.grad = size * torch.randn(parameter.shape)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for twin, parameter in zip(twins, parameters, strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
    expected = nn.utils.clip_grad_norm_(twins, 1.0)
    assert torch.equal(trainer._clip_grad_norm(trainer.model), expected)
    for twin, parameter in zip(twins, parameters, strict=True):
        assert parameter.grad is not None
        assert twin.grad is not None
        assert torch.equal(parameter.grad, twin.grad)


def run_script(scenario: str, folder: Path, *launcher: str) -> str:
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [*(launcher or (sys.executable,)), __file__, scenario, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kill_9_at_any_moment_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert "killed 6 times" in run_script("kill", tmp_path)
    final = [checkpoint.load_tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "killed")]
    assert_same(*final)
    assert len(list((tmp_path / "run").iterdir())) == 2  # two checkpoints, and nothing left of the dead


def test_two_processes(tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = str(20000 + os.getpid() % 20000)
    run_script("two", tmp_path, *accelerate, "--main_process_port", port)
    ranks = [checkpoint.load_tensors(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert all(tensors.pop("world_size").item() == 2 for tensors in ranks)
    batches = [tensors.pop("batch") for tensors in ranks]
    assert not torch.equal(*batches)
    assert_same(*ranks)  # weights of all four runs
    for name in [name for name in ranks[0] if name.startswith("whole.")]:
        assert torch.equal(ranks[0][name], ranks[0]["resumed." + name.removeprefix("whole.")]), name
    assert any(name.startswith("nan.") for name in ranks[0])
    folder = tmp_path / "run" / "checkpoint-8"
    files = checkpoint.verify(folder).files
    assert {"rng-0.safetensors", "rng-1.safetensors", "extra-0.safetensors", "extra-1.safetensors"} <= set(files)
    with pytest.raises(CheckpointError, match="world_size 2, not 1"):
        make_trainer(tmp_path / "run", **OPTIONS).train(resume_from_checkpoint=folder)
    error = (tmp_path / "nan-0.txt").read_text()
    assert error == (tmp_path / "nan-1.txt").read_text()
    assert error.startswith("Step 5: the loss is nan")


def kill_scenario(folder: Path) -> None:
    """Train in forked children, so that libraries are imported once, and kill them at random moments."""

    def train(output_dir: Path | None, result: str) -> int:
        process = os.fork()
        if process:
            return process
        trainer = make_trainer(output_dir, max_steps=45, **OPTIONS)
        if output_dir is not None:
            trainer.args.save_steps = 1
        resume = output_dir is not None and checkpoint.latest_checkpoint(output_dir) is not None
        trainer.train(resume_from_checkpoint=resume)
        checkpoint.save_tensors(folder / f"{result}.safetensors", state_of(trainer))
        os._exit(0)

    def num_saved() -> int:
        steps = [int(path.name.rpartition("-")[2]) for path in checkpoint.checkpoints(folder / "run")]
        return max(steps, default=0)

    assert os.waitpid(train(None, "whole"), 0)[1] == 0
    chance, kills = random.Random(0), 0
    for _ in range(6):
        target = num_saved() + chance.randint(1, 5)  # at most 30 of the 45 steps are done before the last kill
        process = train(folder / "run", "killed")
        while num_saved() < target:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(process, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        for found in checkpoint.checkpoints(folder / "run"):
            checkpoint.verify(found)
    assert os.waitpid(train(folder / "run", "killed"), 0)[1] == 0
    checkpoint.remove_stale(folder / "run")
    print(f"killed {kills} times")  # noqa: T201


def two_process_scenario(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    whole = make_trainer(**OPTIONS)
    whole.train()
    make_trainer(folder / "run", callbacks=[StopAt(5)], **OPTIONS).train()
    resumed = make_trainer(folder / "run", **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    broken = make_trainer(**OPTIONS)
    broken.nan_from = 5 if rank == 1 else 10**9
    try:
        broken.train()
    except NonFiniteLossError as error:
        (folder / f"nan-{rank}.txt").write_text(str(error))
    tensors = {"world_size": torch.tensor(torch.distributed.get_world_size()), "batch": whole.seen[0]}
    for name, trainer in (("whole", whole), ("resumed", resumed), ("nan", broken)):
        tensors |= {f"{name}.{key}": value for key, value in state_of(trainer).items()}
    next_stage = RotationTrainer(whole.pipeline, make_config(seed=3), train_dataset=None)  # the same LoRA goes on
    next_stage.train()
    tensors |= {f"next.{key}": value for key, value in state_of(next_stage).items()}
    assert any(not torch.equal(tensors[f"next.{key}"], tensors[f"whole.{key}"]) for key in state_of(whole))
    checkpoint.save_tensors(folder / f"rank-{rank}.safetensors", tensors)


if __name__ == "__main__":
    {"kill": kill_scenario, "two": two_process_scenario}[sys.argv[1]](Path(sys.argv[2]))
