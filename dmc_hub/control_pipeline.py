"""What both control pipelines share when `dmc_hub` is installed: verified loading, sharing, the up-sampler's view."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from dmc_hub import checkpoint, portable, transfer

# diffusers loads the components of a saved pipeline from modules that are already imported only.
from dmc_hub import scheduler as _scheduler  # noqa: F401
from dmc_hub.adapters import AdaptableController, outbox
from dmc_hub.compilation import CompiledNetwork, device_of, missing_compiler, warn_of_fallback
from dmc_hub.conditions import EpisodeConditions
from dmc_hub.models import (  # noqa: F401
    action_transformer,
    conditional_unet,
    critic,
    dit,
    inverse_dynamics,
    normalizer,
    temporal_unet,
    vision_encoder,
)
from dmc_hub.publish import Published, publish


class ControlPipeline(AdaptableController, DiffusionPipeline):
    """A diffusion pipeline that acts. Adds LoRA handling on the component `denoiser` to diffusers' pipeline."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        variant: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        verify: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline from a folder or the Hub; it computes bit for bit what the saved one did.

        Where there is a manifest, every file is compared with it: code and configurations before they are used, weights
        while they load (`checkpoint.verifying`). A repo must have one, and a copy on this machine that differs from it
        is downloaded once more. No code of the repo runs: names of its code files stand for the installed modules.

        Args:
            pretrained_model_name_or_path: folder, or repo on the Hub.
            revision: branch, tag or commit of the repo.
            variant: load the weights that were saved under this name.
            token: by default the one that is logged in.
            cache_dir: huggingface_hub's by default.
            local_files_only: use only what was downloaded before.
            force_download: download even what was downloaded before.
            verify: compare every file with the manifest; False loads a folder that was changed by hand.
            trust_remote_code: run the code of components that are neither ours nor a library's.
            kwargs: diffusers' further arguments, such as `torch_dtype` or a component to use instead.

        Raises:
            FileNotFoundError: the folder holds no pipeline.
            HubError: the repo cannot be read.
            ValueError: it holds another pipeline, one that this version cannot read, or files that were changed.
        """
        load = partial(cls._load, pretrained_model_name_or_path, variant, trust_remote_code, kwargs)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return load(folder, None, verify=verify and (folder / checkpoint.MANIFEST_NAME).is_file())
        fetch = partial(
            transfer.fetch,
            transfer.repo_id_of(pretrained_model_name_or_path),
            wanted=lambda name: portable.is_needed(name, variant, code=trust_remote_code),
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        repo = fetch(revision=revision, force_download=force_download, verify=False)
        try:
            return load(repo.folder, repo, verify=verify)
        except checkpoint.CheckpointError:  # a copy on this machine may be damaged: it is downloaded once more
            repo = fetch(revision=repo.revision, verify=True)
            return load(repo.folder, repo, verify=True)

    @classmethod
    def _load(
        cls,
        name: str | os.PathLike[str],
        variant: str | None,
        trust_remote_code: bool,
        options: dict[str, Any],
        folder: Path,
        repo: transfer.Snapshot | None,
        *,
        verify: bool,
    ) -> Any:
        """Load from a folder, of a repo if one is given, whose files are meanwhile compared with its manifest."""
        needed = partial(portable.is_needed, variant=variant, code=trust_remote_code) if repo else None
        with checkpoint.verifying(folder, needed) if verify else nullcontext() as manifest:
            index = portable.check_loadable(
                folder, [base.__name__ for base in cls.__mro__], trust_remote_code=trust_remote_code
            )
            if manifest is not None:
                portable.check_nothing_added(folder, manifest.files)
            try:
                pipeline = super().from_pretrained(
                    folder, variant=variant, use_safetensors=True, trust_remote_code=trust_remote_code, **options
                )
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError) as error:
                raise portable.UnreadableRepoError(
                    f"`{name}` does not load: {type(error).__name__}: {error}"
                ) from error
            components = {name: component for name, component in pipeline.components.items() if name not in options}
            portable.check_weights(folder, components, variant)
        pipeline.register_to_config(_task=portable.task_of(index))
        if repo is not None:
            pipeline._comes_from(str(name), repo.revision)
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
        """diffusers' way to read the index: here the installed classes take the place of the repo's code."""
        return portable.installed_names(super()._dict_from_json_file(json_file, **options))

    @property
    def task_metadata(self) -> dict[str, Any]:
        """What one must know to act: sizes, horizon, and what `describe_task` said; saved with the pipeline."""
        return portable.describe(self)

    def describe_task(self, **facts: Any) -> None:
        """Keep JSON-ready facts on the task (its id, environment, spaces, how to choose actions) with the pipeline."""
        self.register_to_config(_task={**(self.config.get("_task") or {}), **facts})

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, variant: str | None = None, max_shard_size: int | str = "10GB"
    ) -> None:
        """As in diffusers, as safetensors, with the code that plain diffusers needs to load it, and a manifest.

        Raises:
            ValueError: an adapter is attached: diffusers would write a broken checkpoint.
        """
        if self.lora_names:
            raise ValueError(
                "This pipeline carries a LoRA adapter: save the adapter with `save_lora_weights`, then `unload_lora()` "
                "and save the foundation."
            )
        if self.components.get("upsampler") is not None and self.upsampler_policy().lora_names:
            raise ValueError(
                "The up-sampler carries a LoRA adapter: save it with `upsampler_policy().save_lora_weights`, then "
                "`upsampler_policy().unload_lora()` and save the pipeline."
            )
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        folder = Path(save_directory)
        portable.embed(folder, self)
        checkpoint.write_manifest(folder, portable.pipeline_files(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        variant: str | None = None,
        report: str | os.PathLike[str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> Published:
        """Push the pipeline with its code, a card and a manifest.

        Args:
            repo_id: `user/name`; created if it is not there.
            variant: save the weights under this name.
            report: folder of the run whose report.json the card's figures come from.
            private: visibility of a new repo.
            revision: branch to push to.
            token: by default the one that is logged in.
            commit_message: of the commit.

        Raises:
            ValueError: an adapter is attached, or a component's code does not travel.
            HubError: the push failed. The pipeline is kept in a folder, and the message ends with the command that
                pushes it.
        """
        with outbox(report) as folder:
            self.save_pretrained(folder / "pipeline", variant=variant)
            (published,) = publish(
                folder / "pipeline", repo_id, private=private, revision=revision, token=token, message=commit_message
            )
        self._comes_from(published.repo_id, published.revision)
        return published

    def _comes_from(self, repo_id: str, revision: str) -> None:
        self.register_to_config(_name_or_path=repo_id, _hub_repo=repo_id, _hub_revision=revision)

    def condition_source(self, data: Any, *, process_index: int = 0, num_processes: int = 1) -> EpisodeConditions:
        """What a trainer draws conditions and windows from: `Episodes` or a `datasets.Dataset`, whole on each
        process."""
        return EpisodeConditions(self, data)

    def complete_condition(self, condition: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Add what a trainer's condition needs and data do not hold: nothing here, a draft for an `UpsamplerPolicy`."""
        return condition

    def compile(self, *, dtype: torch.dtype | None = None) -> None:
        """Compile denoiser and up-sampler for acting: calls of the pipeline use the graphs, whose outputs differ by
        rounding; trainers compute as before, so that a ratio on policy stays exactly 1.

        The first call with each number of observations times candidates takes the time to compile. Weights and
        adapters are followed. Where nothing can be compiled, a `CompilationWarning` says so and all stays as it is.

        Args:
            dtype: `torch.bfloat16` multiplies in that precision, which pays on processors with units for it; None
                keeps the precision.
        """
        reason = missing_compiler(device_of(self.denoiser))
        if reason is not None:
            warn_of_fallback(type(self).__name__, reason)
            return
        networks = [self.denoiser, self.components.get("upsampler")]
        self._compiled = {id(each): CompiledNetwork(each, dtype=dtype) for each in networks if each is not None}

    def acting_network(self, network: nn.Module) -> Any:
        """What stands in for a network while acting: its compiled form, if there is one."""
        compiled = vars(self).get("_compiled", {}).get(id(network))
        return compiled if compiled is not None and torch.is_inference_mode_enabled() else network

    def upsampler_policy(self) -> UpsamplerPolicy:
        """The up-sampler as a controller of its own: what trainers take to align it instead of the denoiser."""
        return UpsamplerPolicy(self)


class UpsamplerPolicy(AdaptableController):
    """`p(x^r | x^cond, observation)` as a controller: DDPO, DPO, SFT and QV-PG train a LoRA on the up-sampler.

    `complete_condition` draws `x^cond`, the condition's `draft`, from the pipeline's controller as it is, adapter
    included; the candidates of one condition share it. Everything else is the pipeline's.

    Raises:
        ValueError: the pipeline has no up-sampler.
    """

    adapted_component = "upsampler"

    def __init__(self, pipeline: Any) -> None:
        if pipeline.upsampler is None:
            raise ValueError("`pipeline` has no up-sampler: train one with CascadeTrainer.")
        self.pipeline = pipeline
        self.denoiser = pipeline.upsampler

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # while this object is being copied
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def complete_condition(self, condition: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Add a draft for each row, sampled by the controller without gradient."""
        with torch.no_grad():
            return {**condition, "draft": self.pipeline.sample(condition, generator=generator)}

    def predict(
        self, sample: Tensor, timestep: float | Tensor, condition: dict[str, Tensor], denoiser: nn.Module | None = None
    ) -> Tensor:
        """The up-sampler's output; see the pipeline."""
        assert "draft" in condition, "`complete_condition` was forgotten"
        return cast(Tensor, self.pipeline.predict(sample, timestep, condition, denoiser))

    def sample(self, condition: dict[str, Tensor], **options: Any) -> Tensor:
        """Samples of the up-sampler; see the pipeline."""
        assert "draft" in condition, "`complete_condition` was forgotten"
        return cast(Tensor, self.pipeline.sample(condition, **options))
