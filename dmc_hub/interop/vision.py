"""The image encoder of LeRobot's Diffusion Policy: ResNet and spatial softmax (arXiv:1509.06113, Sec. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class KeypointEncoder(ModelMixin, ConfigMixin):
    """Keypoints of images: where the softmax of each channel of a ResNet's features has its centre.

    Args:
        image_size: height and width of the feature network's input, after resizing and cropping.
        backbone: `"resnet18"` or `"resnet34"`.
        num_keypoints: channels whose centres are taken; the features are `2 * num_keypoints` wide.
        num_encoders: 1 for one network for all cameras, or one for each.
        num_cameras: images per observation.
        group_norm: groups of 16 channels instead of batch normalisation.
        resize: height and width that images are resized to first.
        crop: whether images are cropped to `image_size` around their centre.
        num_channels: of an image.
    """

    @register_to_config
    def __init__(
        self,
        image_size: Sequence[int],
        backbone: str = "resnet18",
        num_keypoints: int = 32,
        num_encoders: int = 1,
        num_cameras: int = 1,
        group_norm: bool = False,
        resize: Sequence[int] | None = None,
        crop: bool = False,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        if backbone not in DEPTHS:
            raise ValueError(f"`backbone` must be one of {', '.join(DEPTHS)}; got {backbone!r}.")
        if num_encoders not in (1, num_cameras):
            raise ValueError(f"`num_encoders` must be 1 or {num_cameras}, one per camera; got {num_encoders}.")
        size = [-(-int(length) // 32) for length in image_size]
        self.encoders = nn.ModuleList(
            _CameraEncoder(size, backbone, num_keypoints, group_norm, num_channels) for _ in range(num_encoders)
        )
        self.register_buffer("mean", torch.zeros(num_cameras, num_channels, 1, 1))
        self.register_buffer("std", torch.ones(num_cameras, num_channels, 1, 1))

    @property
    def feature_dim(self) -> int:
        """Width of the features of all cameras."""
        return 2 * self.config.num_keypoints * self.config.num_cameras

    def forward(self, images: Tensor) -> Tensor:
        """Features `(batch, feature_dim)` of images `(batch, num_cameras, channels, height, width)` in `[0, 1]`."""
        expected = (self.config.num_cameras, self.config.num_channels)
        if images.ndim != 5 or tuple(images.shape[1:3]) != expected:
            raise ValueError(
                f"`images` must have shape (batch, {expected[0]}, {expected[1]}, height, width), got "
                f"{tuple(images.shape)}."
            )
        cameras = ((images - self.mean) / (self.std + 1e-8)).unbind(1)
        encoders = list(self.encoders) * (len(cameras) // len(self.encoders))
        features = [encoder(self._resized(images)) for encoder, images in zip(encoders, cameras, strict=True)]
        return torch.cat(features, dim=-1)

    def _resized(self, images: Tensor) -> Tensor:
        if self.config.resize is not None:
            size = list(self.config.resize)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if self.config.crop:
            height, width = self.config.image_size
            top, left = round((images.shape[-2] - height) / 2), round((images.shape[-1] - width) / 2)
            images = images[..., top : top + height, left : left + width]
        return images


class _CameraEncoder(nn.Module):
    def __init__(
        self, size: Sequence[int], backbone: str, num_keypoints: int, group_norm: bool, num_channels: int
    ) -> None:
        super().__init__()
        config = ResNetConfig(
            num_channels=num_channels,
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=list(DEPTHS[backbone]),
            layer_type="basic",
        )
        self.backbone = ResNetModel(config)
        if group_norm:
            _use_group_norm(self.backbone)
        self.keypoints = nn.Conv2d(512, num_keypoints, 1)
        self.projection = nn.Linear(2 * num_keypoints, 2 * num_keypoints)
        rows, columns = (torch.linspace(-1, 1, length, dtype=torch.float64) for length in size)
        grid = torch.stack([columns.repeat(len(rows)), rows.repeat_interleave(len(columns))], dim=1)
        self.register_buffer("grid", grid.float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        heat = self.keypoints(self.backbone(images).last_hidden_state)
        centres = heat.flatten(2).softmax(dim=-1) @ self.grid
        return self.projection(centres.flatten(1)).relu()


def _use_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(child.num_features // 16, child.num_features))
        else:
            _use_group_norm(child)


def torchvision_names(backbone: str) -> Mapping[str, str]:
    """Module of torchvision's ResNet, without its last two in an `nn.Sequential` -> module of transformers' ResNet."""
    names = {"0": "embedder.embedder.convolution", "1": "embedder.embedder.normalization"}
    for stage, depth in enumerate(DEPTHS[backbone]):
        for block in range(depth):
            theirs, ours = f"{4 + stage}.{block}", f"encoder.stages.{stage}.layers.{block}"
            for i in (0, 1):
                names[f"{theirs}.conv{i + 1}"] = f"{ours}.layer.{i}.convolution"
                names[f"{theirs}.bn{i + 1}"] = f"{ours}.layer.{i}.normalization"
            names[f"{theirs}.downsample.0"] = f"{ours}.shortcut.convolution"
            names[f"{theirs}.downsample.1"] = f"{ours}.shortcut.normalization"
    return names
