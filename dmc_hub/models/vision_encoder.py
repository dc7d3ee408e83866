"""Images to features: residual networks with group normalisation, and spatial softmax.

This file travels to the Hub with every image policy: it imports torch and diffusers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_SIZE = 8
"""Observations that a frozen encoder sees at once."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder(ModelMixin, ConfigMixin):
    """A ResNet per camera, or one for all, with keypoints or average pooling: the encoder of Diffusion Policy.

    Batch statistics are never used, so that an averaged or frozen encoder computes what the trained one did, and it
    computes the same in training and in evaluation: random crops are an argument (section III-A of Chi et al., 2023,
    arXiv:2303.04137; keypoints are the spatial softmax of Levine et al., 2016, arXiv:1504.00702, Sec. 4.2). The layers
    have torchvision's names.

    Args:
        cameras: their names in an observation, in the order of their features.
        depths: residual blocks of each stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
        dims: channels of each stage, multiples of 16; each stage but the first halves the resolution.
        norm: `"group"`, groups of 16 channels, or `"batch"`, fixed statistics of a pretrained network.
        pooling: `"keypoints"`, where the softmax of a channel has its centre, or `"average"`.
        num_keypoints: channels whose centres are taken, each two numbers in `[-1, 1]`.
        projection_dim: width of a linear layer at the end, or None for none.
        projection_relu: whether that layer's negative outputs become 0, as in LeRobot.
        separate: a network for each camera instead of one for all.
        resize: height and width that images are resized to first.
        crop: height and width that are cut out after that: around the centre, unless offsets are given.
        image_mean: of pixels in `[0, 1]`, one for each channel or each camera and channel; ImageNet's by default.
        image_std: likewise; 0.5 for both maps pixels to `[-1, 1]`.
        num_channels: of an image.
    """

    @register_to_config
    def __init__(
        self,
        cameras: Sequence[str] = ("image",),
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        norm: str = "group",
        pooling: str = "keypoints",
        num_keypoints: int = 32,
        projection_dim: int | None = 64,
        projection_relu: bool = False,
        separate: bool = False,
        resize: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_settings(cameras, depths, dims, norm, pooling, (image_mean, image_std), num_channels)
        self.encoders = nn.ModuleList(
            _CameraEncoder(num_channels, depths, dims, norm, pooling, num_keypoints, projection_dim, projection_relu)
            for _ in range(len(cameras) if separate else 1)
        )

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras, in the order of their features."""
        return tuple(self.config.cameras)

    @property
    def feature_dim(self) -> int:
        """Width of the features of all cameras."""
        encoder: Any = self.encoders[0]
        return len(self.cameras) * int(encoder.feature_dim)

    def forward(self, images: Tensor, crop_offsets: Tensor | None = None) -> Tensor:
        """Features of one or more observations.

        Args:
            images: of shape `(..., num_cameras, num_channels, height, width)`, uint8, or floating point in `[0, 1]`.
            crop_offsets: rows and columns above and left of the crops, integers `(..., num_cameras, 2)`; see
                `random_crop_offsets`. None: around the centre.

        Returns:
            Float32 features of shape `(..., feature_dim)`.

        Raises:
            ValueError: images of another shape or dtype, or smaller than the crop.
        """
        expected = (len(self.cameras), self.config.num_channels)
        if images.ndim < 4 or tuple(images.shape[-4:-2]) != expected:
            raise ValueError(
                f"`images` must have shape (..., {expected[0]}, {expected[1]}, height, width), got "
                f"{tuple(images.shape)}."
            )
        if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
            raise ValueError(f"`images` must be uint8, or floating point in [0, 1]; got {images.dtype}.")
        leading = images.shape[:-4]
        pixels = self._cropped(_resized(images.flatten(0, -4), self.config.resize), crop_offsets)
        pixels = self._normalized(pixels.unflatten(0, (-1, expected[0]))).to(self.dtype)
        if self.config.separate:
            parts = [encoder(pixels[:, i]) for i, encoder in enumerate(self.encoders)]
            features = torch.cat(parts, dim=-1)
        else:
            features = self.encoders[0](pixels.flatten(0, 1)).reshape(len(pixels), -1)
        return features.float().reshape(*leading, -1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Features as of `forward`, of a frozen encoder: without gradient, and of crops around the centre.

        Kernels round by the size of their batch. Here that is always the same, so that the features of an image are the
        same bit for bit, whether a whole dataset or one observation is encoded.
        """
        flat = images.reshape(-1, *images.shape[-4:])
        padded = torch.cat([flat, flat[:1].expand(-len(flat) % GROUP_SIZE, *flat.shape[1:])])
        features = torch.cat([self(group) for group in padded.split(GROUP_SIZE)])
        return features[: len(flat)].reshape(*images.shape[:-4], -1)

    def random_crop_offsets(
        self, image_size: Sequence[int], shape: Sequence[int], generator: torch.Generator | None = None
    ) -> Tensor:
        """Offsets of random crops, int64 of shape `(*shape, num_cameras, 2)`, every position equally likely.

        Args:
            image_size: height and width of the images as they come.
            shape: leading dimensions of the images.
            generator: source of the randomness, on CPU.
        """
        height, width = self.config.resize or image_size
        crop = self.config.crop or (height, width)
        _check_crop((height, width), crop)
        ranges = [
            torch.randint(length - cut + 1, (*shape, len(self.cameras)), generator=generator)
            for length, cut in zip((height, width), crop, strict=True)
        ]
        return torch.stack(ranges, dim=-1)

    def _cropped(self, images: Tensor, offsets: Tensor | None) -> Tensor:
        """Of `(batch, channels, height, width)`, each at its own place."""
        if self.config.crop is None:
            return images
        (height, width), size = self.config.crop, images.shape[-2:]
        _check_crop(size, (height, width))
        if offsets is None:
            top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
            return images[..., top : top + height, left : left + width]
        tops, lefts = offsets.reshape(-1, 2).to(images.device).unbind(1)
        rows = tops[:, None] + torch.arange(height, device=images.device)
        columns = lefts[:, None] + torch.arange(width, device=images.device)
        which = torch.arange(len(images), device=images.device)[:, None, None]
        cut = images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]]
        return cut.movedim(-1, 1)

    def _normalized(self, images: Tensor) -> Tensor:
        """Of `(batch, num_cameras, channels, height, width)`; float32 whatever dtype the networks have."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        shape = (-1, self.config.num_channels, 1, 1)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device).reshape(shape)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (pixels - mean) / std


class _CameraEncoder(nn.Module):
    """Images `(batch, channels, height, width)` to features `(batch, feature_dim)`."""

    def __init__(
        self,
        num_channels: int,
        depths: Sequence[int],
        dims: Sequence[int],
        norm: str,
        pooling: str,
        num_keypoints: int,
        projection_dim: int | None,
        projection_relu: bool,
    ) -> None:
        super().__init__()
        self.backbone = _ResNet(num_channels, depths, dims, norm)
        self.keypoints = nn.Conv2d(dims[-1], num_keypoints, 1) if pooling == "keypoints" else None
        pooled_dim = 2 * num_keypoints if pooling == "keypoints" else dims[-1]
        self.projection = None if projection_dim is None else nn.Linear(pooled_dim, projection_dim)
        self.projection_relu = projection_relu
        self.feature_dim = pooled_dim if projection_dim is None else projection_dim

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.backbone(images)
        features = hidden.mean((2, 3)) if self.keypoints is None else _centres(self.keypoints(hidden))
        if self.projection is None:
            return features
        projected = self.projection(features)
        result: Tensor = projected.relu() if self.projection_relu else projected
        return result


class _ResNet(nn.Module):
    """Of basic blocks (He et al., 2016, arXiv:1512.03385, Fig. 5 left), without its classifier."""

    def __init__(self, num_channels: int, depths: Sequence[int], dims: Sequence[int], norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, dims[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(norm, dims[0])
        self.num_stages = len(dims)
        for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
            inputs = dims[max(i - 1, 0)]
            blocks = [
                _BasicBlock(inputs if j == 0 else width, width, 2 if i and j == 0 else 1, norm) for j in range(depth)
            ]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.max_pool2d(self.bn1(self.conv1(images)).relu(), 3, stride=2, padding=1)
        for i in range(self.num_stages):
            hidden = getattr(self, f"layer{i + 1}")(hidden)
        return hidden


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(norm, outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        result: Tensor = (hidden + self.downsample(x)).relu()
        return result


class _FixedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that keeps to the statistics it has, in training too."""

    def train(self, mode: bool = True) -> _FixedBatchNorm:
        return super().train(False)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels) if kind == "group" else _FixedBatchNorm(channels).eval()


def _centres(heat: Tensor) -> Tensor:
    """Where the softmax of each channel `(batch, channels, height, width)` has its centre: x and y in `[-1, 1]` of the
    first channel, of the second, ...; shape `(batch, 2 * channels)`."""
    share = heat.flatten(2).softmax(dim=-1).unflatten(2, heat.shape[2:])
    rows, columns = (torch.linspace(-1, 1, length, dtype=heat.dtype, device=heat.device) for length in heat.shape[2:])
    return torch.stack([(share.sum(2) * columns).sum(-1), (share.sum(3) * rows).sum(-1)], dim=-1).flatten(1)


def _resized(images: Tensor, size: Sequence[int] | None) -> Tensor:
    """Of `(batch, channels, height, width)`, float32 in `[0, 1]` where a size is given."""
    if size is None:
        return images
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return F.interpolate(pixels, list(size), mode="bilinear", align_corners=False, antialias=True)


def _check_crop(size: Sequence[int], crop: Sequence[int]) -> None:
    if crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(f"`images` are {size[0]}×{size[1]} pixels, smaller than the crop {crop[0]}×{crop[1]}.")


def _check_settings(
    cameras: Sequence[str],
    depths: Sequence[int],
    dims: Sequence[int],
    norm: str,
    pooling: str,
    statistics: Sequence[Sequence[float]],
    num_channels: int,
) -> None:
    if isinstance(cameras, str) or not cameras or len(set(cameras)) < len(cameras) or "state" in cameras:
        raise ValueError(f"`cameras` must be different names, none of them 'state'; got {cameras!r}.")
    if len(depths) != len(dims) or not dims or any(dim % 16 or dim < 16 for dim in dims) or min(depths) < 1:
        raise ValueError(
            f"`depths` and `dims` must be as long as each other, and `dims` multiples of 16; got {list(depths)} and "
            f"{list(dims)}."
        )
    if norm not in ("group", "batch"):
        raise ValueError(f"`norm` must be 'group' or 'batch', got {norm!r}.")
    if pooling not in ("keypoints", "average"):
        raise ValueError(f"`pooling` must be 'keypoints' or 'average', got {pooling!r}.")
    for name, values in zip(("image_mean", "image_std"), statistics, strict=True):
        if len(values) not in (num_channels, num_channels * len(cameras)):
            raise ValueError(
                f"`{name}` must have {num_channels} entries, or that many for each camera; got {len(values)}."
            )
