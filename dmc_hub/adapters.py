"""LoRA adapters on a controller, tied to the base that they were trained on: saved, loaded, blended, fused, shared."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dmc_hub import cards, checkpoint, portable, transfer
from dmc_hub.publish import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIFFUSERS_ADAPTER_WEIGHTS, Published, publish

PEFT_PREFIX = "base_model.model."
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_SCALING_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules")


class AdaptableController:
    """LoRA handling on a controller's `denoiser`.

    `adapted_component` is the name that the denoiser has among the components, and in diffusers' adapter files.
    """

    adapted_component = "denoiser"
    samples_as_trained = True
    """Whether `sample` draws from the distribution that `predict` describes: not with another guidance."""
    denoiser: Any
    normalizer: Any
    scheduler: Any
    components: Any
    config: Any

    def unguided(self) -> AbstractContextManager[None]:
        """Inside the block `predict` is the network's output as it was pretrained; a policy may guide otherwise."""
        return nullcontext()

    @property
    def lora_names(self) -> list[str]:
        """Names of the adapters on the denoiser, in the order in which they were added."""
        return list(getattr(self.denoiser, "peft_config", None) or {})

    def add_lora(self, config: LoraConfig, *, adapter_name: str = "default", seed: int = 0) -> None:
        """Put a fresh LoRA on the denoiser and freeze the base. It starts as the identity.

        Args:
            config: peft's, left as it is; without `target_modules` every linear and 1-D convolution layer is adapted.
            adapter_name: must be new.
            seed: of the adapter's initialisation; the global random state is left alone.
        """
        if adapter_name in self.lora_names:
            raise ValueError(
                f"`adapter_name` {adapter_name!r} is already on this pipeline: unload it or choose another."
            )
        self._refuse_while_fused("add an adapter")
        _check_leaves_base(config)
        config = copy.deepcopy(config)
        if config.target_modules is None:
            config.target_modules = set(adaptable_modules(self.denoiser))
        before = list(self.denoiser.parameters())
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
                torch.manual_seed(seed)
                self.denoiser.add_adapter(config, adapter_name=adapter_name)
        except (TypeError, ValueError) as error:
            self._remove_lora(adapter_name)
            raise ValueError(f"`config` does not describe a LoRA for this denoiser: {error}") from error
        for parameter in before:
            parameter.requires_grad_(False)

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """Inside the block the denoiser is the foundation, bit for bit: the reference policy of every alignment."""
        if not self.lora_names:
            raise ValueError("This pipeline has no LoRA adapter to disable: call `add_lora` or `load_lora_weights`.")
        self._refuse_while_fused("switch the adapters off")
        layers = self._adapted_layers()
        if all(layer.disable_adapters for layer in layers):
            yield  # inside another such block, which ends it
            return
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    def base_weights(self) -> dict[str, Tensor]:
        """The denoiser's state without adapters, under the names that it has without them: the foundation's."""
        state = {**self.denoiser.state_dict(), **self._weights_before_fusing()}
        return {n.replace(".base_layer.", "."): tensor for n, tensor in state.items() if ".lora_" not in n}

    def base_fingerprint(self) -> str:
        """SHA-256 over what an adapter depends on: base weights, scheduler, and what else shapes actions."""
        digest = hashlib.sha256()
        schedule = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        digest.update(json.dumps(schedule, sort_keys=True).encode())
        for weights in (self.base_weights(), *self._weights_that_act()):
            for name in sorted(weights):
                tensor = weights[name].detach().cpu().contiguous()
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _base_facts(self) -> dict[str, Any]:
        """What an adapter depends on beside what the fingerprint is of."""
        names = ("horizon", "num_observation_steps")
        return {name: self.config[name] for name in names if name in self.config}

    def _weights_that_act(self) -> list[dict[str, Tensor]]:
        """Of the components besides the denoiser that an adapter depends on: normaliser, and what acts or sees."""
        others = [self.components.get(name) for name in ("inverse_dynamics", "vision_encoder")]
        return [self.normalizer.state_dict(), *({} if model is None else model.state_dict() for model in others)]

    def save_lora_weights(self, save_directory: str | os.PathLike[str], *, adapter_name: str = "default") -> None:
        """Write one adapter in the formats of peft and of diffusers.

        Each file is written under a temporary name and renamed, the manifest last.
        """
        if adapter_name not in self.lora_names:
            raise ValueError(f"`adapter_name` {adapter_name!r} is not on this pipeline; it has {self.lora_names}.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.denoiser.peft_config[adapter_name]
        state = get_peft_model_state_dict(self.denoiser, adapter_name=adapter_name)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        settings, prefix = _json_ready(config.to_dict()), self.adapted_component
        settings["base_model_name_or_path"] = self.config.get("_hub_repo")
        settings["revision"] = self.config.get("_hub_revision")
        metadata = {
            "format": "pt",
            "base_fingerprint": self.base_fingerprint(),
            "base_facts": json.dumps(self._base_facts()),
            "lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in settings.items()}),
        }
        _save_atomically({f"{prefix}.{n}": t for n, t in state.items()}, folder / DIFFUSERS_ADAPTER_WEIGHTS, metadata)
        _save_atomically({f"{PEFT_PREFIX}{n}": t for n, t in state.items()}, folder / ADAPTER_WEIGHTS, metadata)
        checkpoint.write_text(folder / ADAPTER_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        checkpoint.write_manifest(folder, (DIFFUSERS_ADAPTER_WEIGHTS, ADAPTER_WEIGHTS, ADAPTER_CONFIG))

    def load_lora_weights(
        self,
        name_or_path: str | os.PathLike[str],
        *,
        adapter_name: str = "default",
        hotswap: bool = False,
        allow_mismatch: bool = False,
        verify: bool = True,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load an adapter saved by `save_lora_weights` or pushed to the Hub, and make it the active one.

        Where there is a manifest, every file is compared with it first; a repo must have one.

        Args:
            name_or_path: folder, or repo on the Hub.
            adapter_name: must be new, or with `hotswap` that of a loaded adapter.
            hotswap: put the adapter in the place of the loaded one, of whatever rank: which adapters are active, and
                with which weights, stays as it is.
            allow_mismatch: load an adapter of another base, with a warning, where its shapes fit.
            verify: compare every file with the manifest; False loads a folder that was changed by hand.
            revision: branch, tag or commit of the repo; likewise `token`, `cache_dir` and `local_files_only`.

        Raises:
            FileNotFoundError: the folder holds no adapter.
            HubError: the repo cannot be read.
            ValueError: the adapter was trained on another base, or its weights are damaged or do not fit. The pipeline
                is unchanged then.
        """
        if Path(name_or_path).is_dir():
            folder = Path(name_or_path)
            if verify and (folder / checkpoint.MANIFEST_NAME).is_file():
                checkpoint.verify(folder)
        else:
            folder = transfer.fetch(
                transfer.repo_id_of(name_or_path),
                wanted=lambda name: name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                verify=verify,
            ).folder
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"`{name_or_path}` is not an adapter: it has no file {name}.")
        config = _read_adapter_config(folder / ADAPTER_CONFIG)
        state, metadata = _read_adapter_weights(folder / ADAPTER_WEIGHTS)
        _check_same_settings(config, metadata, folder)
        expected, found = self.base_fingerprint(), metadata.get("base_fingerprint")
        facts = {
            **self._base_facts(),
            **json.loads(metadata.get("base_facts", "{}")),
        }  # of old adapters nothing is known
        if found != expected or facts != self._base_facts():
            mismatch = (
                f"The adapter in `{name_or_path}` was trained on another base: on {_named(config, found)}; this "
                f"pipeline is {self._own_name(expected)}{_differences(facts, self._base_facts())}."
            )
            if not allow_mismatch:
                raise ValueError(f"{mismatch} Load the pipeline that the adapter was saved beside.")
            warnings.warn(f"{mismatch} It is loaded all the same (`allow_mismatch`).", stacklevel=2)
        if hotswap:
            self._swap_adapter(config, state, adapter_name, folder)
        else:
            self._attach_adapter(config, state, adapter_name, folder)

    def _attach_adapter(self, config: LoraConfig, state: dict[str, Tensor], adapter_name: str, folder: Path) -> None:
        active = self.get_active_adapters()
        self.add_lora(config, adapter_name=adapter_name)
        try:
            self._fill_adapter(state, adapter_name, folder)
        except ValueError:
            if active:
                self._activate(active)
            self.unload_lora(adapter_name)
            raise

    def _swap_adapter(self, config: LoraConfig, state: dict[str, Tensor], adapter_name: str, folder: Path) -> None:
        if adapter_name not in self.lora_names:
            raise ValueError(
                f"`hotswap` replaces a loaded adapter, but `adapter_name` {adapter_name!r} is not on this pipeline; it "
                f"has {self.lora_names}."
            )
        self._refuse_while_fused("swap an adapter")
        active, weights = self.get_active_adapters(), self.adapter_weights
        old_config = self.denoiser.peft_config[adapter_name]
        old_state = get_peft_model_state_dict(self.denoiser, adapter_name=adapter_name)
        self._activate([name for name in self.lora_names if name != adapter_name])
        self._remove_lora(adapter_name)
        try:
            self._attach_adapter(config, state, adapter_name, folder)
        except ValueError:
            self._attach_adapter(old_config, old_state, adapter_name, folder)
            raise
        finally:
            for name, weight in weights.items():
                self._set_weight(name, weight)
            self._activate(active)

    def _own_name(self, fingerprint: str) -> str:
        source = self.config.get("_hub_repo") or self.config.get("_name_or_path") or type(self).__name__
        return f"`{source}` with the fingerprint {fingerprint[:12]}"

    def push_lora_to_hub(
        self,
        repo_id: str,
        *,
        adapter_name: str = "default",
        base_model: str | None = None,
        base_revision: str | None = None,
        report: str | os.PathLike[str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> Published:
        """Push one adapter, readable by peft and by diffusers, with a card that names its base.

        Args:
            repo_id: `user/name`; created if it is not there.
            adapter_name: which one.
            base_model: repo of this pipeline; by default the one that it was loaded from or pushed to.
            base_revision: commit of that repo.
            report: folder of the run whose report.json the card's figures come from.
            private: visibility of a new repo.
            revision: branch to push to.
            token: by default the one that is logged in.
            commit_message: of the commit.

        Raises:
            ValueError: there is no such adapter.
            HubError: the push failed. The adapter is kept in a folder, and the message ends with the command that
                pushes it.
        """
        with outbox(report) as folder:
            self.save_lora_weights(folder / "adapter", adapter_name=adapter_name)
            (published,) = publish(
                folder / "adapter",
                repo_id,
                base_model=base_model,
                base_revision=base_revision,
                private=private,
                revision=revision,
                token=token,
                message=commit_message,
            )
        return published

    def _fill_adapter(self, state: dict[str, Tensor], adapter_name: str, folder: Path) -> None:
        wanted = get_peft_model_state_dict(self.denoiser, adapter_name=adapter_name)
        problems = [f"unknown key {name}" for name in sorted(state.keys() - wanted.keys())]
        problems += [f"missing key {name}" for name in sorted(wanted.keys() - state.keys())]
        problems += [
            f"{name} has shape {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in sorted(state.keys() & wanted.keys())
            if state[name].shape != wanted[name].shape
        ]
        problems += [f"{name} is not finite" for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        if problems:
            raise ValueError(f"The adapter in `{folder}` does not fit this denoiser: {'; '.join(problems[:3])}.")
        set_peft_model_state_dict(self.denoiser, state, adapter_name=adapter_name)
        self.denoiser.set_adapter(adapter_name)

    def unload_lora(self, adapter_name: str | None = None) -> None:
        """Remove one adapter, or all: without any, the denoiser is the foundation again, all of it trainable."""
        if adapter_name is not None and adapter_name not in self.lora_names:
            raise ValueError(f"`adapter_name` {adapter_name!r} is not on this pipeline; it has {self.lora_names}.")
        self._refuse_while_fused("remove an adapter")
        if self.lora_names:
            self._remove_lora(adapter_name)
        if not self.lora_names:
            self.denoiser.requires_grad_(True)

    def _remove_lora(self, adapter_name: str | None) -> None:
        if adapter_name is None or not set(self.lora_names) - {adapter_name}:
            self.denoiser.unload_lora()
        else:
            self.denoiser.delete_adapters(adapter_name)

    # Several adapters on one foundation, under the names that diffusers' pipelines have for it

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Switch to one adapter, or blend several: the weights of each adapted layer are `W + sum_i w_i s_i B_i A_i`.

        The weights belong to the pipeline, not to the adapters: `save_lora_weights` writes an adapter as it was
        trained, and a trainer takes it at weight 1.

        Args:
            adapter_names: the active adapters; the others have no part in what is computed.
            adapter_weights: `w_i`, one for all or one for each; None is 1.

        Raises:
            ValueError: an unknown name or one that comes twice, no name at all, or weights that are not as many, or not
                finite.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        unknown = [name for name in names if name not in self.lora_names]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(
                f"`adapter_names` must be different names of adapters on this pipeline, which has {self.lora_names}; "
                f"got {names}."
            )
        given = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        weights = [1.0 if weight is None else float(weight) for weight in given]
        if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"`adapter_weights` must be one finite number for each of {names}, got {adapter_weights}.")
        self._refuse_while_fused("change the adapters")
        self._activate(names)
        for name, weight in zip(names, weights, strict=True):
            self._set_weight(name, weight)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that have a part in what is computed."""
        layers = self._adapted_layers()
        return list(layers[0].active_adapters) if layers else []

    @property
    def adapter_weights(self) -> dict[str, float]:
        """The weight of every adapter, active or not."""
        weights: dict[str, float] = {}
        for layer in self._adapted_layers():
            weights.update({name: scaling / _trained_scaling(layer, name) for name, scaling in layer.scaling.items()})
        return weights

    def fuse_lora(self, adapter_names: Sequence[str] | None = None, lora_scale: float = 1.0) -> None:
        """Add adapters to the foundation's weights, for speed: without adapters beside them layers cost what they did.

        Until `unfuse_lora`, which brings back the very weights of before, adapters can be neither added nor removed,
        switched off, reweighted nor trained. A copy of the adapted layers' weights is kept for that.

        Args:
            adapter_names: which to fuse; the active ones by default. What is not fused has no part.
            lora_scale: factor on all their weights.

        Raises:
            ValueError: there is nothing to fuse, an unknown name, adapters that are fused already, or a scale or result
                that is not finite.
        """
        names = self.get_active_adapters() if adapter_names is None else list(adapter_names)
        unknown = [name for name in names if name not in self.lora_names]
        if unknown or not names:
            raise ValueError(f"`adapter_names` must be among the adapters {self.lora_names}; got {names}.")
        if not math.isfinite(lora_scale):
            raise ValueError(f"`lora_scale` must be finite, got {lora_scale}.")
        self._refuse_while_fused("fuse again")
        prefixes = [name for name, module in self.denoiser.named_modules() if isinstance(module, BaseTunerLayer)]
        state = self.denoiser.state_dict()
        kept = {name: state[name].clone() for name in state if name.rpartition(".base_layer.")[0] in prefixes}
        self.denoiser._weights_before_fusing = kept
        try:
            for layer in self._adapted_layers():
                _merge(layer, names, lora_scale)
        except ValueError as error:
            self.unfuse_lora()
            raise ValueError(f"The adapters {names} cannot be fused: {error}") from error

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, bit for bit.

        Raises:
            ValueError: nothing is fused.
        """
        kept = self._weights_before_fusing()
        if not kept:
            raise ValueError("No adapter is fused: there is nothing to undo.")
        state = self.denoiser.state_dict()
        for name, tensor in kept.items():
            state[name].copy_(tensor)
        for layer in self._adapted_layers():
            layer.merged_adapters.clear()
        del self.denoiser._weights_before_fusing

    def _weights_before_fusing(self) -> dict[str, Tensor]:
        """By their names in the denoiser's state; empty while nothing is fused."""
        return cast(dict[str, Tensor], vars(self.denoiser).get("_weights_before_fusing", {}))

    def _refuse_while_fused(self, what: str) -> None:
        if self._weights_before_fusing():
            raise ValueError(f"The adapters are fused: call `unfuse_lora()` before you {what}.")

    def _adapted_layers(self) -> list[Any]:
        return [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def _activate(self, names: Sequence[str]) -> None:
        for layer in self._adapted_layers():
            layer.set_adapter(list(names))

    def _set_weight(self, name: str, weight: float) -> None:
        for layer in self._adapted_layers():
            layer.set_scale(name, weight)


def _trained_scaling(layer: Any, name: str) -> float:
    """`alpha / r` of an adapter in a layer, or rsLoRA's `alpha / sqrt(r)`."""
    rank = layer.r[name]
    return float(layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name, False) else rank))


def _merge(layer: Any, names: Sequence[str], lora_scale: float) -> None:
    scaling = dict(layer.scaling)
    try:
        layer.scaling.update({name: lora_scale * scale for name, scale in scaling.items()})
        layer.merge(safe_merge=True, adapter_names=list(names))
    finally:
        layer.scaling.update(scaling)


@contextmanager
def outbox(report: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder to push from, laid out as a run's; removed afterwards, unless the push fails."""
    folder = Path(tempfile.mkdtemp(prefix="dmc_hub-push-"))
    try:
        for name in (cards.REPORT_NAME, *cards.PICTURES) if report is not None else ():
            if name == cards.REPORT_NAME or (Path(report or "") / name).is_file():
                shutil.copyfile(Path(report or "") / name, folder / name)
        yield folder
    except transfer.HubError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _named(config: LoraConfig, fingerprint: Any) -> str:
    source = (
        "a base without a name" if config.base_model_name_or_path is None else f"`{config.base_model_name_or_path}`"
    )
    return f"{source} with the fingerprint {str(fingerprint)[:12]}"


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    changed = [f"{name} was {value}, is {ours.get(name)}" for name, value in theirs.items() if ours.get(name) != value]
    return f" ({'; '.join(changed)})" if changed else ""


def _check_leaves_base(config: LoraConfig) -> None:
    """With these settings peft trains or overwrites the base, which is the reference policy while the LoRA is off."""
    for name, allowed in (("bias", ("none",)), ("modules_to_save", (None,)), ("init_lora_weights", _INITIALISATIONS)):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"`config.{name}` must leave the base as it is: one of {allowed}, got {value!r}.")


def _check_same_settings(config: LoraConfig, metadata: dict[str, str], folder: Path) -> None:
    """The weights file repeats the settings, because another alpha or rank scales the same weights differently."""
    written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    saved = {key.partition(".")[2]: value for key, value in written.items()}  # behind the component's name
    given = _json_ready(config.to_dict())
    changed = [key for key in _SCALING_SETTINGS if saved.get(key) != given[key]]
    if changed:
        raise ValueError(
            f"`{folder / ADAPTER_CONFIG}` and {ADAPTER_WEIGHTS} disagree on {', '.join(changed)}: one was changed "
            "after the adapter was saved."
        )


def adaptable_modules(model: nn.Module) -> list[str]:
    """Names of the layers LoRA can adapt: linear and 1-D convolution. Adapters that are already there don't count."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))]
    return [name.removesuffix(".base_layer") for name in layers if ".lora_" not in name]


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _save_atomically(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(state, temporary, metadata=metadata)
    os.replace(temporary, path)


def _read_adapter_config(path: Path) -> LoraConfig:
    try:
        settings = portable.read_json(path)
        if settings.get("peft_type") not in ("LORA", "PeftType.LORA"):
            raise ValueError("it does not describe a LoRA adapter")
        settings.pop("peft_type")
        return LoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{path}` is not a usable adapter configuration: {error}.") from error


def _read_adapter_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    portable.read_header(path)  # refuses one that is too long
    try:
        with safe_open(path, framework="pt") as file:
            state = {name.removeprefix(PEFT_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged: {error}.") from error
