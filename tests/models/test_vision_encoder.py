"""The vision encoder against the ResNet of transformers, and against closed forms of its other parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from dmc_hub.interop import InteropError, load_resnet_weights
from dmc_hub.models.vision_encoder import GROUP_SIZE, VisionEncoder

SMALL: dict[str, Any] = {"depths": (1, 1), "dims": (16, 32)}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def small(**changes: Any) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(**{**SMALL, "num_keypoints": 4, "projection_dim": 6, **changes})


def their_resnet(*, group_norm: bool) -> ResNetModel:
    """ResNet-18 with statistics as after training, batch normalisation by groups of 16 channels if wanted."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    model = ResNetModel(config)
    source = torch.Generator().manual_seed(1)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if group_norm:
                    setattr(parent, name, nn.GroupNorm(child.num_features // 16, child.num_features))
                else:
                    child.running_mean = 0.1 * torch.randn(child.num_features, generator=source)
                    child.running_var = 0.5 + torch.rand(child.num_features, generator=source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "normalization" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return model.eval()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_features_are_those_of_transformers_resnet(norm: str) -> None:
    theirs = their_resnet(group_norm=norm == "group")
    encoder = VisionEncoder(norm=norm, pooling="average", projection_dim=None)
    load_resnet_weights(encoder, theirs.state_dict())
    pixels = torch.rand(2, 1, 3, 70, 94, generator=torch.Generator().manual_seed(2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((pixels[:, 0] - mean[:, None, None]) / std[:, None, None]).pooler_output.flatten(1)
        actual = encoder.train()(pixels)
    assert expected.std(0).mean() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_batch_normalised_weights_give_a_group_normalised_encoder_their_convolutions() -> None:
    theirs = their_resnet(group_norm=False).state_dict()
    encoder = VisionEncoder(separate=True, cameras=("front", "wrist"))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    load_resnet_weights(
        encoder, {f"resnet.{name}": tensor for name, tensor in theirs.items()} | {"fc.bias": torch.ones(1)}
    )
    after = encoder.state_dict()
    for i in (0, 1):
        prefix = f"encoders.{i}.backbone."
        assert torch.equal(after[f"{prefix}conv1.weight"], theirs["embedder.embedder.convolution.weight"])
        assert torch.equal(
            after[f"{prefix}layer3.0.downsample.0.weight"],
            theirs["encoder.stages.2.layers.0.shortcut.convolution.weight"],
        )
        assert torch.equal(
            after[f"{prefix}layer4.1.conv2.weight"], theirs["encoder.stages.3.layers.1.layer.1.convolution.weight"]
        )
        convolutions = {name for name in after if name.startswith(prefix) and after[name].ndim == 4}
        assert not any(torch.equal(after[name], before[name]) for name in convolutions)
    unchanged = [name for name in after if after[name].ndim == 1]
    assert all(torch.equal(after[name], before[name]) for name in unchanged)


def test_weights_of_another_resnet_are_refused() -> None:
    state = their_resnet(group_norm=True).state_dict()
    state.pop("encoder.stages.1.layers.0.layer.0.convolution.weight")
    with pytest.raises(InteropError, match=r"missing \['layer2.0.conv1.weight'\], unknown"):
        load_resnet_weights(VisionEncoder(), state)
    with pytest.raises(InteropError, match=r"unknown or of another shape \['bn1.bias'"):
        load_resnet_weights(small(), their_resnet(group_norm=True).state_dict())


def test_a_sharp_peak_is_a_keypoint_at_its_place() -> None:
    """Softmax of one large entry is 1 there; the corners of a 3×5 map are at (±1, ±1), its centre at (0, 0)."""
    from dmc_hub.models.vision_encoder import _centres

    places = {(0, 0): (-1, -1), (2, 4): (1, 1), (1, 2): (0, 0), (0, 3): (0.5, -1)}
    heat = torch.zeros(1, len(places), 3, 5)
    for channel, (row, column) in enumerate(places):
        heat[0, channel, row, column] = 1000
    torch.testing.assert_close(_centres(heat)[0], torch.tensor(list(places.values())).flatten().float())
    flat = torch.zeros(1, 1, 3, 5)
    flat[0, 0, 0, 0] = np.log(4)  # weight 4 of 18
    torch.testing.assert_close(_centres(flat)[0], torch.tensor([-3 / 18, -3 / 18]))


def test_keypoints_move_with_what_is_seen() -> None:
    encoder = small(projection_dim=None, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    with torch.no_grad():
        encoder.encoders[0].keypoints.weight.mul_(30)  # type: ignore[union-attr, operator]
    pattern = images(1, 1, 3, 16, 16)
    left, right = (torch.full((1, 1, 3, 64, 128), 128, dtype=torch.uint8) for _ in range(2))
    left[..., 24:40, 24:40] = pattern
    right[..., 24:40, 88:104] = pattern
    with torch.no_grad():
        moved = (encoder(right) - encoder(left)).unflatten(1, (-1, 2))
    assert moved[..., 0].abs().max() > 0.1  # half the width is 1
    assert moved[..., 1].abs().max() < moved[..., 0].abs().max() / 4


@pytest.mark.parametrize("separate", [False, True])
def test_cameras_are_seen_one_by_one(separate: bool) -> None:
    encoder = small(cameras=("front", "wrist"), separate=separate)
    seen = images(3, 2, 2, 3, 32, 32)
    features = encoder(seen)
    assert features.shape == (3, 2, encoder.feature_dim)
    assert encoder.feature_dim == 12
    assert len(encoder.encoders) == 1 + separate
    changed = seen.clone()
    changed[:, :, 1] = images(3, 2, 3, 32, 32, seed=1)
    difference = encoder(changed) - features
    torch.testing.assert_close(difference[..., :6], torch.zeros(3, 2, 6), atol=1e-6, rtol=0)
    assert difference[..., 6:].abs().max() > 1e-3
    swapped = encoder(seen.flip(2))
    same = torch.allclose(swapped[..., :6], features[..., 6:], atol=1e-6)
    assert same != separate


def test_bytes_and_shares_are_the_same_pixels_and_statistics_belong_to_a_camera() -> None:
    seen = images(2, 2, 3, 32, 32)
    encoder = small(cameras=("a", "b"))
    torch.testing.assert_close(encoder(seen.float() / 255), encoder(seen))
    means, stds = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    each, plain = (
        small(cameras=("a", "b"), image_mean=means, image_std=stds),
        small(cameras=("a", "b"), image_mean=(0,) * 3, image_std=(1,) * 3),
    )
    by_hand = (seen / 255 - torch.tensor(means).view(2, 3, 1, 1)) / torch.tensor(stds).view(2, 3, 1, 1)
    torch.testing.assert_close(each(seen), plain(by_hand))


def test_crops_are_cut_where_the_offsets_say() -> None:
    encoder = small(cameras=("a", "b"), crop=(24, 20))
    whole = small(cameras=("a", "b"))
    seen = images(5, 2, 3, 32, 28)
    offsets = encoder.random_crop_offsets((32, 28), (5,), torch.Generator().manual_seed(0))
    by_hand = torch.stack(
        [
            torch.stack([seen[i, j, :, top : top + 24, left : left + 20] for j, (top, left) in enumerate(row)])
            for i, row in enumerate(offsets.tolist())
        ]
    )
    torch.testing.assert_close(encoder(seen, offsets), whole(by_hand))
    torch.testing.assert_close(encoder(seen), whole(seen[..., 4:28, 4:24]))
    torch.testing.assert_close(encoder.train()(seen), encoder.eval()(seen), rtol=0, atol=0)


def test_every_crop_is_equally_likely() -> None:
    offsets = small(crop=(30, 32)).random_crop_offsets((32, 32), (3000, 2), torch.Generator().manual_seed(0))
    assert offsets.shape == (3000, 2, 1, 2)
    shares = torch.bincount(offsets[..., 0].flatten(), minlength=3) / 6000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert not offsets[..., 1].any()
    again = small(crop=(30, 32)).random_crop_offsets((32, 32), (3000, 2), torch.Generator().manual_seed(0))
    assert torch.equal(again, offsets)


def test_images_are_resized_before_they_are_cropped() -> None:
    seen = images(2, 1, 3, 40, 64).float() / 255
    resized = F.interpolate(seen[:, 0], [20, 32], mode="bilinear", align_corners=False, antialias=True)[:, None]
    expected = small()(resized[..., 2:18, 4:28])
    torch.testing.assert_close(small(resize=(20, 32), crop=(16, 24))(seen), expected)
    offsets = small(resize=(20, 32), crop=(16, 24)).random_crop_offsets((40, 64), (4000,))
    assert offsets[..., 0].max() == 4
    assert offsets[..., 1].max() == 8


@pytest.mark.parametrize("changes", [{}, {"cameras": ("a", "b"), "separate": True}, {"pooling": "average"}])
def test_frozen_features_do_not_depend_on_the_batch(changes: dict[str, Any]) -> None:
    encoder = small(**{"crop": (24, 24), **changes})
    seen = images(GROUP_SIZE * 2 + 3, len(encoder.cameras), 3, 32, 32)
    together = encoder.encode(seen)
    assert not together.requires_grad
    torch.testing.assert_close(together, encoder(seen).detach())
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder.encode(seen[order]), together[order])
    for i in (0, 7, 18):
        assert torch.equal(encoder.encode(seen[i]), together[i])
        assert torch.equal(encoder.encode(seen[None, i : i + 1]), together[None, i : i + 1])


def test_every_weight_learns() -> None:
    for changes in ({}, {"norm": "batch"}, {"pooling": "average", "projection_relu": False}):
        encoder = small(**changes)
        (encoder(images(4, 1, 3, 32, 32)) * torch.arange(1, 7)).square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            is_shift_of_softmax = name.endswith("keypoints.bias")
            assert is_shift_of_softmax or parameter.grad.abs().max() > 0, name


def test_fixed_statistics_stay_in_training() -> None:
    encoder = small(norm="batch").train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items() if "running" in name}
    seen = images(4, 1, 3, 32, 32)
    first = encoder(seen)
    assert before
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(encoder.eval()(seen), first)


def test_saved_and_loaded_it_sees_the_same(tmp_path: Path) -> None:
    encoder = small(cameras=("front", "wrist"), crop=(24, 24), image_mean=(0.1, 0.2, 0.3))
    encoder.save_pretrained(tmp_path)
    loaded = VisionEncoder.from_pretrained(tmp_path)
    assert loaded.cameras == ("front", "wrist")
    seen = images(3, 2, 3, 32, 32)
    assert torch.equal(loaded.encode(seen), encoder.encode(seen))
    half = VisionEncoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.encode(seen).dtype == torch.float32
    torch.testing.assert_close(half.encode(seen), encoder.encode(seen), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": "image"}, "`cameras` must be different names"),
        ({"cameras": ("a", "a")}, "`cameras` must be different names"),
        ({"cameras": ("state",)}, "none of them 'state'"),
        ({"dims": (16, 24)}, "`dims` multiples of 16"),
        ({"depths": (1,)}, "`depths` and `dims` must be as long as each other"),
        ({"norm": "layer"}, "`norm` must be 'group' or 'batch', got 'layer'"),
        ({"pooling": "max"}, "`pooling` must be 'keypoints' or 'average', got 'max'"),
        ({"image_std": (1.0,)}, "`image_std` must have 3 entries, or that many for each camera; got 1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_other_images_are_refused() -> None:
    encoder = small(crop=(24, 24))
    with pytest.raises(
        ValueError, match=r"`images` must have shape \(..., 1, 3, height, width\), got \(2, 3, 32, 32\)"
    ):
        encoder(images(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"`images` must be uint8, or floating point in \[0, 1\]; got torch.int64"):
        encoder(images(1, 3, 32, 32).long())
    for call in (lambda: encoder(images(1, 3, 20, 32)), lambda: encoder.random_crop_offsets((20, 32), (1,))):
        with pytest.raises(ValueError, match="`images` are 20×32 pixels, smaller than the crop 24×24"):
            call()
