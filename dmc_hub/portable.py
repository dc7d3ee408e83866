"""What makes a saved pipeline portable: its code travels beside its weights, and what comes back is checked.

A repo of a pipeline is read in two ways. Plain diffusers runs the code files in it and asks for `trust_remote_code`.
The installed pipeline classes map the names of these files to installed modules and run nothing of the repo.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from dmc_hub import checkpoint
from dmc_hub.errors import DmcHubError, MissingFileError
from dmc_hub.version import __version__

FORMAT = 1
INDEX_NAME = "model_index.json"
FACTS = "_dmc_hub"
"""Key of the index that holds format, version and task; diffusers skips keys that start with an underscore."""
MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_SETTING = 1_000_000
"""Larger numbers in a network's configuration are refused before they are allocated."""
MAX_ENTRIES = 1000
"""Longer lists in it likewise."""
_PRIVATE = ("_name_or_path", "_hub_repo", "_hub_revision", "_task")
_STEM = re.compile(r"dmc_hub_(?P<module>\w+)_(?P<hash>[0-9a-f]{8})")
_WEIGHTS = re.compile(r"[^.]+(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
_LIBRARIES = ("diffusers", "transformers")


class UnreadableRepoError(DmcHubError, ValueError):
    """A repo or folder that this version cannot read, or that does not hold what it says."""


# ---- Saving


def embed(folder: Path, pipeline: Any) -> None:
    """Put the code of a saved pipeline and of its components into `folder`, and facts about it into its index.

    Each file's name ends in a hash of its content: diffusers keeps the code of all repos in one namespace.

    Args:
        folder: what diffusers' `save_pretrained` has written.
        pipeline: the pipeline that was saved there.
    """
    index = json.loads((folder / INDEX_NAME).read_text())
    for path in (*folder.glob("dmc_hub_*.py"), *folder.glob("*/dmc_hub_*.py")):
        path.unlink()
    if _travels(type(pipeline).__module__):
        index["_class_name"] = [_copy_code(type(pipeline).__module__, folder), type(pipeline).__name__]
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_") or value[0] is None:
            continue
        if _travels(value[0]):
            index[name] = [_copy_code(value[0], folder / name), value[1]]
        for config in (folder / name).glob("*config.json"):
            _write_json(config, _without_private(json.loads(config.read_text())))
    index = _without_private(index)
    index[FACTS] = {"format": FORMAT, "version": __version__, "task": describe(pipeline)}
    _write_json(folder / INDEX_NAME, index)


def describe(pipeline: Any) -> dict[str, Any]:
    """What one must know to act with a pipeline: sizes, horizon, and what was said of its task."""
    facts: dict[str, Any] = {
        "observation_dim": pipeline.observation_dim,
        "action_dim": pipeline.action_dim,
        "horizon": pipeline.config.horizon,
        "num_observation_steps": pipeline.num_observation_steps,
        "num_inference_steps": pipeline.config.num_inference_steps,
    }
    encoder = pipeline.components.get("vision_encoder")
    if encoder is not None:
        facts.update(state_dim=pipeline.state_dim, cameras=list(encoder.cameras))
    return {**(pipeline.config.get("_task") or {}), **facts}


def task_of(index: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an index says of the task."""
    return (index.get(FACTS) or {}).get("task")


def _copy_code(module: str, folder: Path) -> str:
    source = Path(inspect.getfile(sys.modules[module])).read_bytes()
    stem = f"dmc_hub_{module.rpartition('.')[2]}_{hashlib.sha256(source).hexdigest()[:8]}"
    (folder / f"{stem}.py").write_bytes(source)
    return stem


def _travels(module: str) -> bool:
    return module == "dmc_hub.scheduler" or module.startswith(("dmc_hub.models.", "dmc_hub.pipelines."))


def _without_private(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _PRIVATE}


def _write_json(path: Path, content: Any) -> None:
    checkpoint.write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---- Files of a saved pipeline


def pipeline_files(folder: Path) -> list[str]:
    """The files of a saved pipeline: index, code, configurations and safetensors of the index's components."""
    index = read_index(folder)
    kinds = (".json", ".py", ".safetensors")
    names = [INDEX_NAME, *(f"{stem}.py" for stem in [_stem_of_class(index)] if stem)]
    for component in _components(index):
        names += [f"{component}/{p.name}" for p in sorted((folder / component).iterdir()) if p.suffix in kinds]
    return [name for name in names if not Path(name).name.startswith(".")]


def check_travels(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise `UnreadableRepoError` unless a saved pipeline can be loaded from the Hub: all its code is in it."""
    if FACTS not in index or not isinstance(index["_class_name"], list):
        raise UnreadableRepoError(
            f"`{folder}` was saved without its code: load it with dmc_hub, and save it again with `save_pretrained`."
        )
    for name, (module, class_name) in _components(index).items():
        if module not in _LIBRARIES and not (folder / name / f"{module}.py").is_file():
            raise UnreadableRepoError(
                f"`{folder}`: the component {name} is a {class_name} of {module}, whose code does not travel. Only "
                "components of dmc_hub, diffusers and transformers can be pushed."
            )


def is_needed(name: str, variant: str | None, *, code: bool) -> bool:
    """Whether loading needs a file: JSON, weights of the variant (and those without one), and code where it is run."""
    if name.endswith(".json"):
        return True
    if name.endswith(".py"):
        return code
    match = _WEIGHTS.fullmatch(name.rpartition("/")[2])
    return match is not None and match["variant"] in (None, variant)


def _stem_of_class(index: Mapping[str, Any]) -> str | None:
    value = index["_class_name"]
    return value[0] if isinstance(value, list) else None


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value[0] is not None
    }


# ---- Reading


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a saved pipeline, checked.

    Raises:
        FileNotFoundError: there is none.
        UnreadableRepoError: it is not an index, or of a format that this version does not read.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise MissingFileError(f"`{folder}` is not a pipeline folder: it has no {INDEX_NAME}.")
    index = read_json(path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) and not _are_two_names(class_name):
        raise UnreadableRepoError(f"`{path}` is not a pipeline's index: its _class_name is {class_name!r}.")
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if re.fullmatch(r"\w+", name) is None or not (value == [None, None] or _are_two_names(value)):
            raise UnreadableRepoError(f"`{path}` is not a pipeline's index: {name!r} is {value!r}.")
    _check_format(index.get(FACTS), path)
    return index


def _are_two_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) and re.fullmatch(r"\w+(\.\w+)*", part) for part in value)
    )


def _check_format(facts: Any, path: Path) -> None:
    if facts is None:  # saved by diffusers alone
        return
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise UnreadableRepoError(f"`{path}` does not say which format of dmc_hub it has.")
    if facts["format"] != FORMAT:
        newer = facts["format"] > FORMAT
        remedy = "upgrade dmc_hub" if newer else "load it with that version, and save it again with this one"
        raise UnreadableRepoError(
            f"`{path}` has format {facts['format']}, written by dmc_hub {facts.get('version')}; this is dmc_hub "
            f"{__version__}, which reads format {FORMAT}: {remedy}."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises `UnreadableRepoError` naming the file if it is something else."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnreadableRepoError(f"`{path}` has {path.stat().st_size} bytes, more than a configuration has.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableRepoError(f"`{path}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UnreadableRepoError(f"`{path}` holds a {type(content).__name__} instead of an object.")
    return content


def installed_names(index: dict[str, Any]) -> dict[str, Any]:
    """The index with each code file of ours replaced by the installed module, and nothing else changed."""
    index = dict(index)
    if isinstance(index["_class_name"], list) and _STEM.fullmatch(str(index["_class_name"][0])):
        index["_class_name"] = index["_class_name"][1]
    for name, (library, class_name) in _components(index).items():
        index[name] = [_installed_module(library), class_name]
    return index


def installed_class(index: dict[str, Any]) -> str:
    """Name of the pipeline's class; of one that only the repo's own code defines, something that is no name."""
    value = installed_names(index)["_class_name"]
    return value if isinstance(value, str) else f"{value[1]} of the repo's own {value[0]}.py"


def _installed_module(library: str) -> str:
    match = _STEM.fullmatch(library)
    if match is None:
        return library
    return "dmc_hub.scheduler" if match["module"] == "scheduler" else f"dmc_hub.models.{match['module']}"


def check_loadable(folder: Path, class_names: list[str], *, trust_remote_code: bool) -> dict[str, Any]:
    """Check a saved pipeline before anything of it is loaded; returns its index.

    Args:
        folder: of the pipeline.
        class_names: names of the class that is to load it, and of its bases.
        trust_remote_code: whether components whose code is neither ours nor a library's may be loaded.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
        UnreadableRepoError: it holds one of another class, code that is not trusted, settings that this version does
            not know, or files that are not plain weights and configurations.
    """
    index = read_index(folder)
    named, class_name = installed_names(index), installed_class(index)
    if class_name not in class_names:
        raise UnreadableRepoError(f"`{folder}` holds a {class_name}, not a {class_names[0]}.")
    for name, (module, component_class) in _components(named).items():
        if module.startswith("dmc_hub."):
            installed = _installed_class(module, component_class, index, folder)
            _check_settings(folder / name, installed, index)
            if issubclass(installed, nn.Module):
                _check_shapes(folder / name, installed)
        elif module not in _LIBRARIES and not trust_remote_code and not _is_imported(module, component_class):
            raise UnreadableRepoError(
                f"`{folder}`: the component {name} is a {component_class} of {module}, which is neither of dmc_hub nor "
                "of diffusers or transformers. Read its code, and if you trust it pass `trust_remote_code=True`."
            )
        for path in (folder / name).glob("*.safetensors"):
            read_header(path)
    return index


def _check_shapes(folder: Path, component: Any) -> None:
    """Compare the network that a configuration describes with its weights, before either is allocated.

    Raises:
        UnreadableRepoError: weights that are missing, left over or of other shapes, or a configuration of more of them.
    """
    files = {path: _WEIGHTS.fullmatch(path.name) for path in sorted(folder.glob("*.safetensors"))}
    variants = {path: match["variant"] for path, match in files.items() if match is not None}
    if not variants:
        return  # what loads it says what is missing
    chosen = min(variants.values(), key=lambda variant: (variant is not None, variant))
    held = {k: e for path, kind in variants.items() if kind == chosen for k, e in read_header(path).items()}
    for name, value in read_json(folder / component.config_name).items():
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            raise UnreadableRepoError(
                f"`{folder / component.config_name}`: {name!r} has {len(value):,} entries, more than a network of "
                "dmc_hub has."
            )
    try:
        shapes = {name: tuple(entry["shape"]) for name, entry in held.items()}
        with torch.device("meta"), _limited_size(sum(math.prod(shape) for shape in shapes.values())):
            wanted = {
                k: tuple(v.shape)
                for k, v in component.from_config(read_json(folder / component.config_name)).state_dict().items()
            }
    except UnreadableRepoError as error:
        raise UnreadableRepoError(f"`{folder / component.config_name}` does not fit its weights: {error}") from error
    except Exception as error:  # whatever a damaged configuration or header makes of a constructor
        raise UnreadableRepoError(f"`{folder}` does not load: {type(error).__name__}: {error}") from error
    if wanted.keys() != shapes.keys():
        raise _wrong_weights(folder, component.__name__, set(wanted), set(shapes))
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise UnreadableRepoError(f"`{folder}`: {name} has shape {shapes[name]}, its configuration says {shape}.")


def _wrong_weights(folder: Path, class_name: str, wanted: set[str], held: set[str]) -> UnreadableRepoError:
    return UnreadableRepoError(
        f"`{folder}` does not hold the weights of its {class_name}: it lacks {sorted(wanted - held)[:3]} and has the "
        f"unknown {sorted(held - wanted)[:3]}."
    )


@contextmanager
def _limited_size(num_elements: int) -> Iterator[None]:
    """Inside the block a network of many more numbers than its weights file holds is refused while it is built."""
    limit, count = 2 * num_elements + 1000, 0

    def register(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal count
        count += 0 if tensor is None else tensor.numel()
        if count > limit:
            raise UnreadableRepoError(
                f"it describes a network of more than {limit:,} numbers, the file has {num_elements:,}."
            )

    hooks = (register_module_parameter_registration_hook(register), register_module_buffer_registration_hook(register))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_nothing_added(folder: Path, files: Collection[str]) -> None:
    """Raise `UnreadableRepoError` if a component's folder holds what its manifest does not list: it might be read."""
    for component in _components(read_index(folder)):
        added = {f"{component}/{path.name}" for path in (folder / component).glob("*")} - set(files)
        if added:
            raise UnreadableRepoError(
                f"`{folder}` holds files that its manifest does not list: {', '.join(sorted(added)[:3])}. Remove them."
            )


def _is_imported(module: str, class_name: str) -> bool:
    """Whether the user's own program has defined this component; naming a module never imports it."""
    found = getattr(sys.modules.get(module), class_name, None)
    return isinstance(found, type) and issubclass(found, ConfigMixin) and found.__module__ == module


def _installed_class(module: str, class_name: str, index: Mapping[str, Any], folder: Path) -> type:
    written_by = f"dmc_hub {(index.get(FACTS) or {}).get('version', 'unknown')}"
    try:
        found = getattr(importlib.import_module(module), class_name) if _travels(module) else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, ConfigMixin)) or found.__module__ != module:
        raise UnreadableRepoError(
            f"`{folder}` needs {class_name} of {module}, which dmc_hub {__version__} does not have; it was "
            f"written by {written_by}."
        )
    return found


def _check_settings(folder: Path, component: Any, index: Mapping[str, Any]) -> None:
    """diffusers only logs settings that it does not know, and computes something else without them."""
    path = folder / component.config_name
    if not path.is_file():
        raise UnreadableRepoError(f"`{path}` is missing.")
    known, held = set(inspect.signature(component.__init__).parameters), read_json(path)
    for name, value in held.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not abs(number) <= MAX_SETTING:
                raise UnreadableRepoError(f"`{path}` has {name}={number}, more than a network of dmc_hub has.")
    hints = typing.get_type_hints(component.__init__)
    for name, value in held.items():
        if name in known and not _fits(value, hints.get(name, Any)):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise UnreadableRepoError(f"`{path}`: {name!r} must be {expected}, got {value!r:.80}.")
    unknown = [name for name in held if not name.startswith("_") and name not in known]
    if unknown:
        raise UnreadableRepoError(
            f"`{path}` has settings that {component.__name__} of dmc_hub {__version__} does not know: "
            f"{', '.join(unknown)}. It was written by dmc_hub {(index.get(FACTS) or {}).get('version', 'unknown')}."
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be what an annotation says; annotations of other than plain types take everything."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, alternative) for alternative in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is types.NoneType:
        return value is None
    if origin in (bool, str, dict):
        return isinstance(value, origin)
    if origin in (int, float):
        return isinstance(value, (int, float) if origin is float else int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        items = [each for each in arguments if each is not Ellipsis]
        return isinstance(value, list) and (not items or all(_fits(item, items[0]) for item in value))
    return True


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensors by name, without reading them.

    Raises:
        UnreadableRepoError: a header that is too long to be read, or damaged.
    """
    return {name: entry for name, entry in _header(path).items() if name != "__metadata__"}


def read_metadata(path: Path) -> dict[str, str]:
    """The free texts in the header of a safetensors file; see `read_header`."""
    metadata = _header(path).get("__metadata__", {})
    return {str(name): str(text) for name, text in metadata.items()} if isinstance(metadata, dict) else {}


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UnreadableRepoError(f"`{path}` has a header of {length} bytes, more than weights need: not read.")
        if size < 8 + length:
            raise UnreadableRepoError(f"`{path}` is damaged: it ends within its header.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UnreadableRepoError(f"`{path}` is damaged: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise UnreadableRepoError(f"`{path}` is damaged: its header is not an object.")
    return header


def _is_finite(tensor: Tensor) -> bool:
    """A sum is read several times as fast as all entries are compared; only one that overflows says too little."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_weights(folder: Path, components: Mapping[str, Any], variant: str | None) -> None:
    """Compare loaded networks with the files that they came from: diffusers loads too few or too many in silence.

    Raises:
        UnreadableRepoError: weights that are missing, left over or not finite.
    """
    for name, module in components.items():
        paths = list((folder / name).glob("*.safetensors"))
        if not isinstance(module, nn.Module) or not paths or not _travels(type(module).__module__):
            continue
        variants = {p: match["variant"] for p in paths if (match := _WEIGHTS.fullmatch(p.name)) is not None}
        chosen = variant if variant in variants.values() else None
        held = {key for path, kind in variants.items() if kind == chosen for key in read_header(path)}
        wanted = set(module.state_dict())
        if held != wanted:
            raise _wrong_weights(folder / name, type(module).__name__, wanted, held)
        broken = [key for key, parameter in module.named_parameters() if not _is_finite(parameter)]
        if broken:
            raise UnreadableRepoError(f"`{folder / name}` holds NaN or infinite weights: {', '.join(broken[:3])}.")
