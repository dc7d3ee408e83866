"""Networks and whole decisions beside the originals of the same widths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmc_hub.benchmarks.originals import CleanDiT, DiffuserUnet, DiffuserValue, guided_sampling
from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.timing import machine, take_turns
from dmc_hub.compilation import CompiledNetwork
from dmc_hub.models.dit import DiffusionTransformer1D

ORIGINAL = "original, eager"


def measure_networks(
    *,
    batch_sizes: Sequence[int] = (1, 64),
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    dit_dim: int = 320,
    num_heads: int = 10,
    compiles: bool = True,
    repeats: int = 15,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Forwards of the temporal U-Net and of the DiT of Decision Diffuser over those of the original architectures.

    `eager` is what a step of sampling evaluates, with the timestep's part kept from earlier steps; `eager, nothing
    kept` a forward with one timestep per sample, as the original's.
    """
    torch.manual_seed(seed)
    width = sizes.observation_dim + sizes.action_dim
    dit: Any = DiffusionTransformer1D(sizes.observation_dim, dim=dit_dim, num_heads=num_heads)
    pairs: dict[str, tuple[Any, Any]] = {
        "U-Net": (DiffuserUnet(width, sizes.dim, sizes.dim_mults), sizes.build(seed=seed).denoiser),
        "DiT": (CleanDiT(sizes.observation_dim, dit_dim, num_heads), dit),
    }
    results: dict[str, Any] = {}
    for kind, (original, ours) in pairs.items():
        original, ours = original.to(device).eval(), ours.to(device).eval()
        results[kind] = {"parameters": {"original": _count(original), "ours": _count(ours)}}
        for batch_size in batch_sizes:
            token_dim = width if kind == "U-Net" else sizes.observation_dim
            sample = torch.randn(batch_size, sizes.horizon, token_dim, device=device)
            more = min(4, max(1, 64 // batch_size))
            runs = _forwards(original, ours, sample, compiles)
            with ours.while_unchanged():  # as around all steps of a run of sampling
                results[kind][str(batch_size)] = take_turns(runs, ORIGINAL, repeats=more * repeats, device=device)
    return results


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _forwards(original: Any, ours: Any, sample: Tensor, compiles: bool) -> dict[str, Callable[[], Any]]:
    timesteps = torch.full((len(sample),), 3.0, device=sample.device)
    graphs: dict[str, Any] = {"eager": ours}
    if compiles:
        graphs["compiled"] = CompiledNetwork(ours)

    def plainly(network: Any, timestep: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                network(sample, timestep)

        return run

    runs = {ORIGINAL: plainly(original, timesteps), "eager, nothing kept": plainly(ours, timesteps)}
    return {**runs, **{name: plainly(network, 3) for name, network in graphs.items()}}


def measure_decision(
    *,
    num_candidates: int = 64,
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    compiles: bool = True,
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """One decision among so many candidates, ranked by the critic, over Diffuser's guided sampling of the same size
    with its two steps along the value's gradient for each denoising step."""
    torch.manual_seed(seed)
    width = sizes.observation_dim + sizes.action_dim
    original = DiffuserUnet(width, sizes.dim, sizes.dim_mults).to(device).eval()
    value = DiffuserValue(width, sizes.horizon, sizes.dim).to(device).eval()
    observation = sizes.observation(seed)
    repeated = torch.as_tensor(observation, device=device).expand(num_candidates, -1)

    def guided() -> None:
        guided_sampling(original, value, repeated, (sizes.horizon, width), num_steps=sizes.num_inference_steps)

    planners: dict[str, Any] = {"eager": sizes.build(device=device, seed=seed)}
    for name, dtype in {"compiled": None, "compiled, bfloat16": torch.bfloat16}.items() if compiles else ():
        planners[name] = sizes.build(device=device, seed=seed)
        planners[name].compile(dtype=dtype)
    runs: dict[str, Callable[[], Any]] = {"original, guided": guided}
    for name, planner in planners.items():
        runs[name] = functools.partial(planner, observation, num_candidates=num_candidates, generator=seed)
    return {
        "num_candidates": num_candidates,
        "parameters_of_the_value_function": _count(value),
        **take_turns(runs, "original, guided", repeats=repeats, device=device, warm_up=1),
    }


def measure_acting(
    *,
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    batch_sizes: Sequence[int] = (1, 64),
    num_candidates: int = 64,
    compiles: bool = True,
    repeats: int = 15,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """`measure_networks` and `measure_decision`."""
    common: dict[str, Any] = {"sizes": sizes, "compiles": compiles, "device": device, "seed": seed}
    return {
        "machine": machine(device),
        "sizes": vars(sizes),
        "networks": measure_networks(batch_sizes=batch_sizes, repeats=repeats, **common),
        "decision": measure_decision(num_candidates=num_candidates, repeats=max(1, repeats // 3), **common),
    }
