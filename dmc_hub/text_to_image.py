"""Stock text-to-image pipelines as controllers that the trainers take.

`TextToImagePolicy` wraps a `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or `StableDiffusion3Pipeline` as it
is: the condition is the encoded prompt, a sample is the latent of an image. A reward function of such a policy is
`(images, prompts, metadata) -> rewards` with `images` of shape `(B, C, H, W)` in `[0, 1]`, and `prompts` and `metadata`
lists of `B` strings and dicts, the latter of the other columns of the prompt's row.
"""

from __future__ import annotations

import inspect
import itertools
import json
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from dmc_hub.adapters import AdaptableController
from dmc_hub.conditions import ConditionSource
from dmc_hub.scheduler import TransitionScheduler

RECORD_BYTES = 1024
"""Longest record, of a prompt with its metadata as JSON, that a condition carries."""

_PLAIN_FLOW = {
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
_PLAIN_VARIANCE_PRESERVING = {
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def transition_scheduler(stock: Any, *, eta: float = 1.0, kernel: str = "ancestral") -> TransitionScheduler:
    """The scheduler of ours on the noise levels, and with the inference steps, of a checkpoint's scheduler.

    At `eta` 0 it samples as diffusers' DDIMScheduler with the same settings (to which the first-order
    EulerDiscreteScheduler is equal), or as FlowMatchEulerDiscreteScheduler. Predictions of `x_0` are never clipped:
    latents have no bounds.

    Args:
        stock: a scheduler with `beta_schedule`, a FlowMatchEulerDiscreteScheduler, or one of ours, which is returned.
        eta: share of the kernel's noise; see `TransitionScheduler`.
        kernel: see `TransitionScheduler`.

    Raises:
        ValueError: a setting that has no counterpart.
    """
    if isinstance(stock, TransitionScheduler):
        return cast(TransitionScheduler, stock)
    config, name = stock.config, type(stock).__name__
    is_flow = isinstance(stock, FlowMatchEulerDiscreteScheduler)
    for setting, only in (_PLAIN_FLOW if is_flow else _PLAIN_VARIANCE_PRESERVING).items():
        if config.get(setting) not in (only, None):
            raise ValueError(f"The {name}'s `{setting}` must be {only!r}, got {config[setting]!r}.")
    if is_flow:
        flow = TransitionScheduler(
            config.num_train_timesteps, "flow", {"shift": config.shift}, "velocity", kernel=kernel, eta=eta
        )
        return cast(TransitionScheduler, flow)
    if "beta_schedule" not in config:
        raise ValueError(f"The noise levels of a {name} are unknown here: pass a `TransitionScheduler` as `scheduler`.")
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in ("leading", "trailing"):
        raise ValueError(
            f"The {name}'s `timestep_spacing` must be 'leading' or 'trailing', got {spacing!r}: set "
            f"`pipeline.scheduler = {name}.from_config(pipeline.scheduler.config, timestep_spacing='trailing')` first."
        )
    levels = DDIMScheduler.from_config(config).alphas_cumprod.double().clamp(min=2**-24)  # 0 with zero terminal SNR
    ends_noisy = "set_alpha_to_one" in inspect.signature(type(stock).__init__).parameters
    options = {
        "alpha_bars": levels.tolist(),
        "timestep_spacing": spacing,
        "steps_offset": config.get("steps_offset", 0) if spacing == "leading" else 0,
        "ends_clean": bool(config.set_alpha_to_one) if ends_noisy else True,
    }
    result: TransitionScheduler = TransitionScheduler(
        len(levels), "tabulated", options, config.get("prediction_type", "epsilon"), kernel=kernel, eta=eta
    )
    return result


class _Architecture(ABC):
    """What differs between the pipelines: how prompts are encoded, and how the network is called."""

    component: str

    @abstractmethod
    def encode(self, pipeline: Any, prompt: str, negative_prompt: str | None) -> tuple[dict[str, Tensor], ...]:
        """The condition of one prompt, one row each, and that of its absence."""

    @abstractmethod
    def arguments(self, policy: TextToImagePolicy, condition: dict[str, Tensor]) -> dict[str, Any]:
        """The network's arguments besides sample and timestep."""


class _StableDiffusion(_Architecture):
    component = "unet"

    def encode(self, pipeline: Any, prompt: str, negative_prompt: str | None) -> tuple[dict[str, Tensor], ...]:
        embeddings = pipeline.encode_prompt(
            prompt, pipeline.unet.device, 1, do_classifier_free_guidance=True, negative_prompt=negative_prompt
        )
        return tuple({"embedding": each} for each in embeddings)

    def arguments(self, policy: TextToImagePolicy, condition: dict[str, Tensor]) -> dict[str, Any]:
        return {"encoder_hidden_states": condition["embedding"]}


class _StableDiffusionXL(_StableDiffusion):
    def encode(self, pipeline: Any, prompt: str, negative_prompt: str | None) -> tuple[dict[str, Tensor], ...]:
        embedding, absent, pooled, absent_pooled = pipeline.encode_prompt(
            prompt, device=pipeline.unet.device, do_classifier_free_guidance=True, negative_prompt=negative_prompt
        )
        return {"embedding": embedding, "pooled": pooled}, {"embedding": absent, "pooled": absent_pooled}

    def arguments(self, policy: TextToImagePolicy, condition: dict[str, Tensor]) -> dict[str, Any]:
        pooled, size = condition["pooled"], (policy.height, policy.width)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=pooled.device)
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}
        return {"encoder_hidden_states": condition["embedding"], "added_cond_kwargs": added}


class _StableDiffusion3(_Architecture):
    component = "transformer"

    def encode(self, pipeline: Any, prompt: str, negative_prompt: str | None) -> tuple[dict[str, Tensor], ...]:
        embedding, absent, pooled, absent_pooled = pipeline.encode_prompt(
            prompt,
            None,
            None,
            device=pipeline.transformer.device,
            do_classifier_free_guidance=True,
            negative_prompt=negative_prompt,
        )
        return {"embedding": embedding, "pooled": pooled}, {"embedding": absent, "pooled": absent_pooled}

    def arguments(self, policy: TextToImagePolicy, condition: dict[str, Tensor]) -> dict[str, Any]:
        return {"encoder_hidden_states": condition["embedding"], "pooled_projections": condition["pooled"]}


_ARCHITECTURES: tuple[tuple[type, _Architecture], ...] = (
    (StableDiffusionXLPipeline, _StableDiffusionXL()),
    (StableDiffusion3Pipeline, _StableDiffusion3()),
    (StableDiffusionPipeline, _StableDiffusion()),
)


class TextToImagePolicy(AdaptableController):
    """A stock text-to-image pipeline as a controller: `predict`, `sample`, `decode`, and LoRA handling.

    The pipeline stays what it was, with its own scheduler; training changes the weights of its `unet` or `transformer`,
    or of a LoRA on it. `save_lora_weights` writes what `load_lora_weights` of plain diffusers reads.

    A condition holds the encoded prompt and, as bytes, the prompt with its metadata, for reward functions. Each prompt
    is encoded by itself, because encoders round by the composition of their batch, and kept in a cache.

    Args:
        pipeline: `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or `StableDiffusion3Pipeline`.
        scheduler: of training; by default `transition_scheduler(pipeline.scheduler)`.
        num_inference_steps: default number of denoising steps.
        guidance_scale: of classifier-free guidance in sampling; 1 is off, at half the cost.
        training_guidance_scale: of `predict`, and with it of every loss; `guidance_scale` by default. Where the two
            differ, DDPO computes the log-probabilities of its samples under this one.
        negative_prompt: what guidance leads away from; the pipeline's own default if None.
        height: of images in pixels; likewise `width`. By default what the network was trained on.
        prompt_cache_size: encoded prompts that are kept.
        image_cache_size: encoded images of pairs that are kept, of data that are held in memory.
        decode_batch_size: latents that the autoencoder decodes at a time.

    Raises:
        ValueError: another kind of pipeline, or a scheduler without a counterpart.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        scheduler: TransitionScheduler | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        training_guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt_cache_size: int = 1024,
        image_cache_size: int = 4096,
        decode_batch_size: int = 16,
    ) -> None:
        kinds = [architecture for kind, architecture in _ARCHITECTURES if isinstance(pipeline, kind)]
        if not kinds:
            names = ", ".join(kind.__name__ for kind, _ in _ARCHITECTURES)
            raise ValueError(f"`pipeline` must be one of {names}; got {type(pipeline).__name__}.")
        self.pipeline = pipeline
        self._architecture = kinds[0]
        self.adapted_component = self._architecture.component
        self.scheduler = transition_scheduler(pipeline.scheduler) if scheduler is None else scheduler
        self.guidance_scale = guidance_scale
        self.training_guidance_scale = guidance_scale if training_guidance_scale is None else training_guidance_scale
        self.samples_as_trained = self.guidance_scale == self.training_guidance_scale
        self.negative_prompt = negative_prompt
        native = self.denoiser.config.sample_size * pipeline.vae_scale_factor
        self.height, self.width = native if height is None else height, native if width is None else width
        for name in ("height", "width"):
            if getattr(self, name) % pipeline.vae_scale_factor:
                raise ValueError(f"`{name}` must be a multiple of {pipeline.vae_scale_factor}.")
        self.prompt_cache_size = prompt_cache_size
        self.image_cache_size = image_cache_size
        self.decode_batch_size = decode_batch_size
        self._num_inference_steps = num_inference_steps
        self._cache: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._absent: dict[str, Tensor] = {}

    @property
    def denoiser(self) -> Any:
        """The network that is trained: the pipeline's `unet` or `transformer`."""
        return getattr(self.pipeline, self.adapted_component)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's."""
        return cast(dict[str, Any], self.pipeline.components)

    @property
    def config(self) -> FrozenDict:
        """The pipeline's, with what trainers ask of any controller."""
        name = self.pipeline.config.get("_name_or_path")
        repo = None if not name or Path(name).exists() else name
        steps = self._num_inference_steps
        return FrozenDict({**self.pipeline.config, "_hub_repo": repo, "num_inference_steps": steps, "horizon": 1})

    @property
    def critic(self) -> Any:
        """There is none: text-to-image has no default reward."""
        raise ValueError("`reward_function` is needed: text-to-image has no critic to reward with.")

    def _weights_that_act(self) -> list[dict[str, Tensor]]:
        return []

    # Conditions

    def condition_source(self, data: Any, *, process_index: int = 0, num_processes: int = 1) -> ConditionSource:
        """What a trainer draws prompts from: see `PromptConditions`, or `PromptTasks` for several sets of them."""
        kind = TaskConditions if isinstance(data, PromptTasks) else PromptConditions
        return kind(self, data, process_index=process_index, num_processes=num_processes)

    @torch.no_grad()
    def prompt_condition(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """The condition of each prompt, with its metadata (JSON-ready, and with the prompt at most `RECORD_BYTES`)."""
        rows = [self._encoded(prompt) for prompt in prompts]
        condition = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        records = [_to_record(p, m) for p, m in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
        return {**condition, "record": torch.stack(records).to(self.denoiser.device)}

    def _encoded(self, prompt: str) -> dict[str, Tensor]:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        condition, absent = self._architecture.encode(self.pipeline, prompt, self.negative_prompt)
        self._absent = self._absent or absent
        self._cache[prompt] = condition
        if len(self._cache) > self.prompt_cache_size:
            self._cache.popitem(last=False)
        return condition

    def complete_condition(self, condition: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The condition as it is."""
        return condition

    def repeat(self, condition: dict[str, Tensor], num_candidates: int) -> dict[str, Tensor]:
        """Each condition `num_candidates` times in a row."""
        return {name: value.repeat_interleave(num_candidates, dim=0) for name, value in condition.items()}

    def free_entries(self, condition: dict[str, Tensor]) -> None:
        """All entries count: nothing is in-painted."""
        return

    # The network

    def predict(
        self, sample: Tensor, timestep: float | Tensor, condition: dict[str, Tensor], denoiser: nn.Module | None = None
    ) -> Tensor:
        """The network's output for `sample` with the guidance of training; `denoiser` stands in for the component."""
        return self._guided(sample, timestep, condition, denoiser, self.training_guidance_scale)

    @contextmanager
    def unguided(self) -> Iterator[None]:
        """Inside the block `predict` is without guidance, as in pretraining."""
        scale, self.training_guidance_scale = self.training_guidance_scale, 1.0
        try:
            yield
        finally:
            self.training_guidance_scale = scale

    def _guided(
        self, sample: Tensor, timestep: float | Tensor, condition: dict[str, Tensor], denoiser: Any, scale: float
    ) -> Tensor:
        levels = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        known = {name: value for name, value in condition.items() if name != "record"}
        if scale == 1:
            return self._output(sample, levels, known, denoiser)
        if not self._absent:
            _, self._absent = self._architecture.encode(self.pipeline, "", self.negative_prompt)
        both = {
            name: torch.cat([self._absent[name].to(value).expand_as(value), value]) for name, value in known.items()
        }
        output = self._output(torch.cat([sample] * 2), torch.cat([levels] * 2), both, denoiser)
        absent, present = output.chunk(2)
        return absent + scale * (present - absent)

    def _output(self, sample: Tensor, levels: Tensor, condition: dict[str, Tensor], denoiser: Any) -> Tensor:
        dtype = self.denoiser.dtype
        arguments = self._architecture.arguments(self, {name: value.to(dtype) for name, value in condition.items()})
        network = self.denoiser if denoiser is None else denoiser
        scaled = self.scheduler.scale_model_input(sample, levels)
        return cast(Tensor, network(scaled.to(dtype), timestep=levels, **arguments, return_dict=False)[0].float())

    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        denoiser: nn.Module | None = None,
        num_grad_steps: int = 0,
        resume: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """Denoise from noise to latents `(B, C, h, w)`, with the guidance of sampling.

        Args:
            condition: of `prompt_condition`.
            num_inference_steps: denoising steps; the policy's own by default.
            generator: source of all noise.
            denoiser: stands in for the component.
            num_grad_steps: gradients flow through the last so many steps only (`sg(., K)` of arXiv:2502.12198).
            resume: latents, and the number of denoising steps that led to them: go on from there.
        """
        steps = self._num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps.tolist()
        if resume is None:
            shape = self.latent_shape(len(condition["record"]))
            noise = randn_tensor(shape, generator=generator, device=self.denoiser.device)
            latents = noise * self.scheduler.init_noise_sigma
        else:
            latents, timesteps = resume[0], timesteps[resume[1] :]
        grad = torch.is_grad_enabled()
        for step, timestep in enumerate(timesteps):
            with torch.set_grad_enabled(grad and step >= len(timesteps) - num_grad_steps):
                output = self._guided(latents, timestep, condition, denoiser, self.guidance_scale)
                latents = self.scheduler.step(output, timestep, latents, generator=generator, return_dict=False)[0]
        return cast(Tensor, latents)

    def latent_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        """`(batch_size, channels, height, width)` of latents."""
        factor = self.pipeline.vae_scale_factor
        return batch_size, self.denoiser.config.in_channels, self.height // factor, self.width // factor

    # Images

    def decode(self, latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
        """What reward functions take: images `(B, C, H, W)` in `[0, 1]`, prompts, and metadata."""
        vae = self.pipeline.vae
        mean, std = self._latent_statistics(latents)
        chunks = (latents * std + mean).to(vae.dtype).split(self.decode_batch_size)
        decoded = torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in chunks]).float()
        prompts, metadata = zip(*(_from_record(record) for record in condition["record"].cpu()), strict=True)
        return (decoded / 2 + 0.5).clamp(0, 1), list(prompts), list(metadata)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images `(B, C, H, W)` in `[0, 1]`: the autoencoder's mode."""
        vae = self.pipeline.vae
        chunks = (2 * images - 1).to(vae.device, vae.dtype).split(self.decode_batch_size)
        encoded = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in chunks]).float()
        mean, std = self._latent_statistics(encoded)
        return (encoded - mean) / std

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the autoencoder's own latents: ours are those normalised."""
        config = self.pipeline.vae.config
        mean = torch.tensor(config.get("latents_mean") or [config.get("shift_factor") or 0.0]).to(like)
        std = torch.tensor(config.get("latents_std") or [1.0]).to(like) / config.scaling_factor
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def _to_record(prompt: str, metadata: Mapping[str, Any]) -> Tensor:
    """A prompt with its metadata as `RECORD_BYTES` bytes: what conditions, buffers and checkpoints can hold."""
    try:
        text = json.dumps([prompt, dict(metadata)], ensure_ascii=False).encode()
    except TypeError as error:
        raise ValueError(f"The metadata of the prompt {prompt!r} must be JSON-ready: {error}.") from error
    if len(text) > RECORD_BYTES:
        raise ValueError(
            f"The prompt {prompt[:60]!r} has {len(text)} bytes with its metadata, more than {RECORD_BYTES}: shorten "
            "it, or drop columns that no reward needs."
        )
    return torch.frombuffer(bytearray(text.ljust(RECORD_BYTES)), dtype=torch.uint8)


def _from_record(record: Tensor) -> tuple[str, dict[str, Any]]:
    prompt, metadata = json.loads(bytes(record.tolist()))
    return prompt, metadata


class PromptConditions(ConditionSource):
    """Prompts, and images if there are any, as conditions and examples.

    Args:
        policy: encodes them.
        data: rows, each a prompt or a mapping with `prompt`, perhaps `image` (PIL, or an array or tensor as diffusers'
            image processor takes it), and further JSON-ready columns, which are the metadata for reward functions. A
            list or `datasets.Dataset` is drawn from at random, whole on each process. A `datasets.IterableDataset`, or
            anything else that can be iterated again and again, is streamed in its order, with each process its own
            part, and never held in memory.
        process_index: of this process.
        num_processes: that share a stream.
        task: goes into the metadata as `task`.

    Raises:
        ValueError: there are no rows, or ones without a prompt.
    """

    def __init__(
        self,
        policy: TextToImagePolicy,
        data: Any,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        task: str | None = None,
    ) -> None:
        self.policy = policy
        self.data = data
        self._added = {} if task is None else {"task": task}
        self._latents: dict[int, Tensor] = {}
        self._rows: Sequence[Any] | None = data if isinstance(data, (Sequence, Dataset)) else None
        self._stream = None if self._rows is not None else _Stream(data, process_index, num_processes)
        if self._rows is not None and not len(self._rows):
            raise ValueError("`train_dataset` has no rows: pass prompts.")
        first = self._row(self._peek(1)[0])
        self.has_examples = "image" in first

    def conditions(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.policy.prompt_condition(*_columns(self._take(count, generator)))

    def examples(self, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.has_examples:
            raise ValueError("`train_dataset` has prompts only: add a column `image`.")
        if self._rows is None:
            rows = self._take(count, generator)
            return self._encoded(rows), self.policy.prompt_condition(*_columns(rows))
        indices = self._indices(count, generator)
        missing = [index for index in dict.fromkeys(indices) if index not in self._latents]
        found = {index: self._latents[index] for index in indices if index in self._latents}
        if missing:
            found |= dict(zip(missing, self._encoded([self._row(self._rows[index]) for index in missing])))
        self._latents = dict(itertools.islice((self._latents | found).items(), self.policy.image_cache_size))
        condition = self.policy.prompt_condition(*_columns([self._row(self._rows[index]) for index in indices]))
        return torch.stack([found[index] for index in indices]), condition

    def _encoded(self, rows: list[dict[str, Any]]) -> Tensor:
        """Latents of the rows' images, each encoded by itself: a resumed run fills its cache in other batches."""
        processor = self.policy.pipeline.image_processor
        images = torch.cat([processor.preprocess(row["image"], self.policy.height, self.policy.width) for row in rows])
        return torch.cat([self.policy.encode_images(image / 2 + 0.5) for image in images.split(1)])

    def trial(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The first prompts, with noise for latents."""
        condition = self.policy.prompt_condition(*_columns([self._row(row) for row in self._peek(4)]))
        shape = self.policy.latent_shape(len(condition["record"]))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.policy.denoiser.device), condition

    def _peek(self, count: int) -> list[Any]:
        if self._rows is None:
            assert self._stream is not None
            return self._stream.peek(count)
        return [self._rows[index] for index in range(min(count, len(self._rows)))]

    def _take(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        if self._rows is None:
            assert self._stream is not None
            return [self._row(row) for row in self._stream.take(count)]
        return [self._row(self._rows[index]) for index in self._indices(count, generator)]

    def _indices(self, count: int, generator: torch.Generator) -> list[int]:
        assert self._rows is not None
        return torch.randint(len(self._rows), (count,), generator=generator).tolist()

    def _row(self, row: Any) -> dict[str, Any]:
        return {**_row(row), **self._added}

    def state(self) -> dict[str, Tensor]:
        return {} if self._stream is None else {"position": torch.tensor([self._stream.epoch, self._stream.position])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._stream is not None:
            self._stream.seek(*state["position"].tolist())


@dataclass(frozen=True)
class PromptTasks:
    """Several sets of prompts, each of a task; the metadata of a prompt say which: `{"task": name}`.

    Attributes:
        prompts: by name, what `PromptConditions` takes.
        in_turn: the prompts of one draw, that is of one micro-batch or buffer, are of one task, and the tasks take
            turns (Algorithm 1 of arXiv:2401.12244); False: each draw has the same number of each task.
    """

    prompts: Mapping[str, Any]
    in_turn: bool = True


class TaskConditions(ConditionSource):
    """Draws from `PromptTasks`."""

    has_examples = False

    def __init__(
        self, policy: TextToImagePolicy, data: PromptTasks, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if not data.prompts:
            raise ValueError("`train_dataset` has no task: pass prompts by name.")
        self.policy = policy
        self.data = data
        self._draws = 0
        self._sources = {
            name: PromptConditions(policy, rows, process_index=process_index, num_processes=num_processes, task=name)
            for name, rows in data.prompts.items()
        }

    def conditions(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        sources = list(self._sources.values())
        if self.data.in_turn:
            source = sources[self._draws % len(sources)]
            self._draws += 1
            return source.conditions(count, generator)
        if count % len(sources):
            raise ValueError(f"The {count} conditions of one draw must be a multiple of the {len(sources)} tasks.")
        parts = [source.conditions(count // len(sources), generator) for source in sources]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def examples(self, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        raise ValueError("Prompts of tasks have no images: pass `pretraining_dataset`.")

    def trial(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The first prompts of each task, with noise for latents."""
        trials = [source.trial() for source in self._sources.values()]
        condition = {name: torch.cat([each[name] for _, each in trials]) for name in trials[0][1]}
        return torch.cat([latents for latents, _ in trials]), condition

    def state(self) -> dict[str, Tensor]:
        states = {f"{name}.{k}": v for name, source in self._sources.items() for k, v in source.state().items()}
        return {**states, "draws": torch.tensor(self._draws)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._draws = int(state["draws"])
        for name, source in self._sources.items():
            prefix = f"{name}."
            source.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _row(row: Any) -> dict[str, Any]:
    found = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(found, Mapping) or not isinstance(found.get("prompt"), str):
        raise ValueError(f"`train_dataset` must have prompts, or rows with a column `prompt`; got {str(row)[:80]!r}.")
    return dict(found)


def _columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    metadata = [{k: value for k, value in row.items() if k not in ("prompt", "image")} for row in rows]
    return [row["prompt"] for row in rows], metadata


class _Stream:
    """Goes through an iterable again and again, and knows where it is."""

    def __init__(self, data: Iterable[Any], process_index: int, num_processes: int) -> None:
        if not isinstance(data, Iterable) or iter(data) is data:
            raise ValueError(
                "`train_dataset` must be prompts that can be gone through several times: a list, a datasets.Dataset or "
                f"IterableDataset; got {type(data).__name__}."
            )
        self._data = data
        self._part = slice(process_index, None, num_processes)
        if isinstance(data, IterableDataset):
            self._data, self._part = split_dataset_by_node(data, process_index, num_processes), slice(0, None, 1)
        self._ahead: deque[Any] = deque()
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        """Go to row `position` of this process's part, in pass `epoch`."""
        self.epoch, self.position = epoch, position
        self._ahead.clear()
        self._iterator = itertools.islice(self._pass(), position, None)

    def _pass(self) -> Iterator[Any]:
        if isinstance(self._data, IterableDataset):
            self._data.set_epoch(self.epoch)
        return itertools.islice(self._data, self._part.start, None, self._part.step)

    def peek(self, count: int) -> list[Any]:
        """The next rows, at most `count` and at least one, without going on."""
        self._ahead.extend(itertools.islice(self._iterator, max(0, count - len(self._ahead))))
        if not self._ahead:
            raise ValueError("`train_dataset` has no rows for this process: pass more prompts.")
        return list(itertools.islice(self._ahead, count))

    def take(self, count: int) -> list[Any]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Any:
        row = self._ahead.popleft() if self._ahead else next(self._iterator, None)
        if row is None:
            self.seek(self.epoch + 1, 0)
            [row] = self.peek(1)
            self._ahead.clear()
        self.position += 1
        return row
