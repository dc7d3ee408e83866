"""Weights of other libraries' ResNets for `VisionEncoder`, whose layers have torchvision's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dmc_hub.interop.weights import InteropError
from dmc_hub.models.vision_encoder import VisionEncoder

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
_TRANSFORMERS = (
    (r"(resnet\.)?embedder\.embedder\.convolution", "conv1"),
    (r"(resnet\.)?embedder\.embedder\.normalization", "bn1"),
    (r"(resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution", "layer{1}.{2}.downsample.0"),
    (r"(resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization", "layer{1}.{2}.downsample.1"),
    (r"(resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution", "layer{1}.{2}.conv{3}"),
    (r"(resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization", "layer{1}.{2}.bn{3}"),
)


def load_resnet_weights(encoder: VisionEncoder, state: Mapping[str, Tensor]) -> None:
    """Start the networks of an encoder, one or one per camera, from a pretrained ResNet-18 or -34 in place.

    With `norm="batch"` the features are the pretrained network's own. With `norm="group"` those of a network with batch
    normalisation give the convolutions only, as group normalisation has no use for its statistics and scales.

    Args:
        encoder: of the same depths and widths; set `image_mean` and `image_std` to what the weights were trained on.
        state: of torchvision's or timm's ResNet, or of `transformers.ResNetModel` with basic blocks; entries of its
            classifier are left out. Read a file by `safetensors.torch.load_file`.

    Raises:
        InteropError: weights are missing, unknown, or of other shapes.
    """
    names = {name: torchvision_name(name) for name in state}
    theirs = {ours: state[name] for name, ours in names.items() if not re.match(r"(fc|classifier)\.", ours)}
    has_statistics = any(name.endswith("running_mean") for name in theirs)
    networks: Any = encoder.encoders
    for network in networks:
        wanted = network.backbone.state_dict()
        if encoder.config.norm == "group" and has_statistics:
            kept = {name for name, tensor in wanted.items() if tensor.ndim == 4}
            found = {**wanted, **{name: tensor for name, tensor in theirs.items() if name in kept}}
            missing = kept - theirs.keys()
        else:
            found, missing = theirs, wanted.keys() - theirs.keys()
        wrong = [name for name in found if name not in wanted or found[name].shape != wanted[name].shape]
        if missing or wrong:
            raise InteropError(
                f"The weights do not fit the encoder's ResNet: missing {sorted(missing)[:3]}, unknown or of another "
                f"shape {sorted(wrong)[:3]}."
            )
        network.backbone.load_state_dict(found)


def torchvision_name(name: str) -> str:
    """torchvision's name of an entry of `transformers.ResNetModel`; other names stay."""
    module, _, leaf = name.rpartition(".")
    for pattern, target in _TRANSFORMERS:
        match = re.fullmatch(pattern, module)
        if match:
            numbers = [int(number) + 1 if i != 1 else int(number) for i, number in enumerate(match.groups()[1:])]
            return f"{target.format(None, *numbers)}.{leaf}"
    return name


def named_by_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of torchvision's ResNet without its last two modules in an `nn.Sequential`, under its own names."""
    names = {"0": "conv1", "1": "bn1", **{str(4 + i): f"layer{i + 1}" for i in range(4)}}
    parts = ((name.partition("."), tensor) for name, tensor in state.items())
    return {f"{names.get(first, first)}.{rest}": tensor for (first, _, rest), tensor in parts}
