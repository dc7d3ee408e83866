"""Frames per second of the vision encoder, without and with gradient, with the bare ResNet as the floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dmc_hub.models.vision_encoder import GROUP_SIZE, VisionEncoder


def frames_per_second(
    *, batch_size: int, image_size: int = 96, crop: int = 84, repetitions: int = 5, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Median frames per second of each kind of pass, in turns, of ResNet-18 with groups and keypoints.

    Args:
        batch_size: frames at once.
        image_size: height and width of the frames; 96 is Push-T's.
        crop: height and width that the network sees.
        repetitions: passes of each kind that count; one more of each comes before.
        device: where they run.
        seed: of the weights and frames.

    Returns:
        `frames_per_second` by kind, `share_of_floor` (encoder over bare ResNet, without and with gradient), settings.
    """
    torch.manual_seed(seed)
    encoder = VisionEncoder(crop=(crop, crop)).to(device)
    frames = torch.randint(0, 256, (batch_size, 1, 3, image_size, image_size), dtype=torch.uint8, device=device)
    offsets = encoder.random_crop_offsets((image_size, image_size), (batch_size,)).to(device)
    pixels = torch.rand(batch_size, 3, crop, crop, device=device)
    networks: Any = encoder.encoders
    resnet = networks[0].backbone

    def without_gradient(network: Callable[..., Any], *inputs: torch.Tensor) -> None:
        with torch.inference_mode():
            network(*inputs)

    kinds: dict[str, Callable[[], Any]] = {
        "ResNet forward": lambda: without_gradient(resnet, pixels),
        "encoder forward": lambda: without_gradient(encoder, frames),
        f"encoder frozen, in groups of {GROUP_SIZE}": lambda: without_gradient(encoder.encode, frames),
        "ResNet forward and backward": lambda: resnet(pixels).square().mean().backward(),
        "encoder forward and backward": lambda: encoder(frames, offsets).square().mean().backward(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repetitions + 1):
        for name, run in kinds.items():
            seconds[name].append(_timed(run, device))
    rates = {name: batch_size / statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "frames_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "share_of_floor": {
            kind: round(rates[f"encoder {kind}"] / rates[f"ResNet {kind}"], 3)
            for kind in ("forward", "forward and backward")
        },
        "settings": {"batch_size": batch_size, "image_size": image_size, "crop": crop, "device": device},
    }


def _timed(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
