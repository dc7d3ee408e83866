"""Reading tensors from files of others without running code, and giving them this library's names."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmc_hub.errors import DmcHubError
from dmc_hub.models.conditional_unet import ConditionalUnet1D
from dmc_hub.models.temporal_unet import TemporalUnet

Model = TypeVar("Model", bound=nn.Module)


class InteropError(DmcHubError, ValueError):
    """Something of another library cannot be read or has no counterpart here; the message says what."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InteropError(f"`{path}` is missing.") from None
    except (OSError, ValueError) as error:
        raise InteropError(f"`{path}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InteropError(f"`{path}` does not hold a JSON object.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a state dictionary that `torch.save` wrote."""
    if path.suffix != ".safetensors":
        return checked_tensors(read_torch_file(path), path)
    try:
        return checked_tensors(load_file(path), path)
    except FileNotFoundError:
        raise InteropError(f"`{path}` is missing.") from None
    except (OSError, SafetensorError) as error:
        raise InteropError(f"`{path}` is damaged: {error}.") from error


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, where it consists of tensors, numbers, strings and containers of them.

    Nothing else is ever built: torch's restricted unpickler calls no code of the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InteropError(f"`{path}` is missing.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InteropError(
            f"`{path}` holds more than tensors or is damaged, and is not unpickled: {reason} If you trust it, take its "
            "state dictionary out where its own library is installed, and save that with safetensors."
        ) from error


def checked_tensors(state: Any, source: Path) -> dict[str, Tensor]:
    """`state` if it is a dictionary of finite tensors."""
    if not isinstance(state, Mapping) or not state:
        raise InteropError(f"`{source}` does not hold a dictionary of tensors.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InteropError(f"`{source}` holds {name!r}, a {type(tensor).__name__}, where a tensor was expected.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InteropError(f"`{source}` has NaN or infinite entries in {name!r}.")
    return dict(state)


def child(folder: Path, name: Any) -> Path:
    """The file of `folder` that a configuration names; it must lie in the folder itself."""
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", ".."):
        raise InteropError(f"`{folder}` names the file {name!r}, which is not one of the folder.")
    return folder / name


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def renamed(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with the modules' names replaced as `modules` says; the others' stay."""

    def new(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return f"{modules.get(module, module)}.{leaf}"

    return {new(name): tensor for name, tensor in state.items()}


def build(model_type: type[Model], state: Mapping[str, Tensor], source: object, **config: Any) -> Model:
    """A model of `config` with exactly these weights, in evaluation mode.

    Raises:
        InteropError: a key is missing or unknown, or a shape differs.
    """
    with torch.random.fork_rng(devices=[]):
        model = model_type(**config)
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} has no counterpart" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise InteropError(f"The weights of {source} do not fit {model_type.__name__}: {'; '.join(problems[:4])}.")
    model.load_state_dict(dict(state))
    return model.eval()


@dataclass(frozen=True)
class UnetNames:
    """What another library calls the modules of a temporal U-Net: `{i}` stands for the level, `{j}` for the block.

    `block` maps the parts of this library's residual blocks; `time` are the two linear layers of the time embedding,
    `head` convolution, normalisation and projection.
    """

    time: tuple[str, str]
    down: str
    half: str
    middle: tuple[str, str]
    up: str
    double: str
    head: tuple[str, str, str]
    block: Mapping[str, str]

    def modules(self, state: Iterable[str]) -> dict[str, str]:
        """Their name of each module of a state dictionary -> ours."""
        pattern = re.compile(re.escape(self.down).replace(r"\{i\}", r"(\d+)").replace(r"\{j\}", "0") + r"\.")
        levels = 1 + max((int(match[1]) for name in state if (match := pattern.match(name))), default=-1)
        if levels < 1:
            raise InteropError(f"The weights hold no U-Net: no key looks like {self.down.format(i=0, j=0)!r}.")
        return {theirs: ours for ours, theirs in self._pairs(min(levels, 64))}

    def _pairs(self, levels: int) -> Iterator[tuple[str, str]]:
        yield from zip(("time_embedding.0", "time_embedding.2"), self.time)
        yield from zip(("head.0.0", "head.0.1", "head.1"), self.head)
        for j, place in enumerate(("first", "second")):
            yield from self._block(f"middle.{place}", self.middle[j])
            for i in range(levels):
                yield from self._block(f"down.{i}.{place}", self.down.format(i=i, j=j))
            for i in range(levels - 1):
                yield from self._block(f"up.{i}.{place}", self.up.format(i=i, j=j))
        for i in range(levels - 1):
            yield f"down.{i}.resample", self.half.format(i=i)
            yield f"up.{i}.resample", self.double.format(i=i)

    def _block(self, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        for part, name in self.block.items():
            yield f"{ours}.{part}", f"{theirs}.{name}"


def conditional_unet(state: Mapping[str, Tensor], source: object) -> ConditionalUnet1D:
    """The network of a state dictionary that has this library's names; its sizes follow from the tensors."""
    dims = _dims(state, source)
    timestep_dim = _shape(state, "time_embedding.2.weight", source)[0]
    film = _shape(state, "down.0.first.film.1.weight", source)
    result: ConditionalUnet1D = build(
        ConditionalUnet1D,
        state,
        source,
        action_dim=_shape(state, "head.1.weight", source)[0],
        condition_dim=film[1] - timestep_dim,
        dims=dims,
        kernel_size=_shape(state, "down.0.first.block_in.0.weight", source)[2],
        timestep_dim=timestep_dim,
        cond_predict_scale=film[0] == 2 * dims[0],
    )
    return result


def temporal_unet(state: Mapping[str, Tensor], source: object, *, timestep_embedding: str) -> TemporalUnet:
    """As `conditional_unet`, for a planner's network."""
    dims = _dims(state, source)
    if any(dim % dims[0] for dim in dims):
        raise InteropError(f"The U-Net of {source} has the widths {dims}, not multiples of the first.")
    result: TemporalUnet = build(
        TemporalUnet,
        state,
        source,
        transition_dim=_shape(state, "head.1.weight", source)[0],
        dim=dims[0],
        dim_mults=[dim // dims[0] for dim in dims],
        kernel_size=_shape(state, "down.0.first.block_in.0.weight", source)[2],
        timestep_embedding=timestep_embedding,
        timestep_dim=_shape(state, "time_embedding.0.weight", source)[1],
        head_kernel_size=_shape(state, "head.0.0.weight", source)[2],
    )
    return result


def _dims(state: Mapping[str, Tensor], source: object) -> list[int]:
    names = itertools.takewhile(state.__contains__, (f"down.{i}.first.block_in.0.weight" for i in itertools.count()))
    dims = [_shape(state, name, source)[0] for name in names]
    if not dims or any(dim % 8 for dim in dims):
        raise InteropError(f"The U-Net of {source} has the widths {dims}; they must be divisible by 8.")
    return dims


def _shape(state: Mapping[str, Tensor], name: str, source: object) -> tuple[int, ...]:
    if name not in state:
        raise InteropError(f"The weights of {source} lack what is called {name} here.")
    return tuple(state[name].shape)
