"""Networks compiled for inference: one graph per network, with weights in the layout that the backend likes."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from dmc_hub.models.dit import DiffusionTransformer1D, modulate
from dmc_hub.models.temporal_unet import TemporalUnet


class CompilationWarning(UserWarning):
    """A network is not compiled: it computes as before."""


class CompiledNetwork:
    """Stands in for a network where nothing is trained, and is called like it.

    What depends on the timestep alone stays outside of the graph and is looked up. If the compiler fails, a
    `CompilationWarning` says so once and the network itself answers.

    Args:
        network: a denoiser; its weights, adapters included, are followed.
        dtype: `torch.bfloat16` multiplies in that precision and keeps everything else as it is; None changes nothing.
    """

    def __init__(self, network: Any, *, dtype: torch.dtype | None = None) -> None:
        self.network = network
        self._dtype = dtype
        self._has_failed = False
        self._packed = ChannelsLastUnet(network, dtype) if isinstance(network, TemporalUnet) else None
        mode = "reduce-overhead" if device_of(network).type == "cuda" else "default"
        self._graph: Callable[..., Tensor] = torch.compile(self._function(), dynamic=False, mode=mode)

    def _function(self) -> Callable[..., Tensor]:
        if self._packed is not None:
            return self._packed
        if isinstance(self.network, DiffusionTransformer1D):
            return functools.partial(fused_denoise, self.network)
        return lambda *inputs: self.network(*inputs, return_dict=False)[0]

    @contextmanager
    def while_unchanged(self) -> Iterator[None]:
        """Inside the block the weights stay as they are; entering takes them over."""
        if self._packed is not None and not self._packed.follow(self.network):
            self._fail("an adapter of another kind than LoRA cannot be added to its weights")
        with getattr(self.network, "while_unchanged", nullcontext)():
            yield

    def __call__(
        self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The network's output in a tuple."""
        assert not return_dict, "a compiled network returns tuples"
        if not self._has_failed:
            try:
                with self._autocast(sample.device):
                    return (self._graph(*self._inputs(sample, timestep, condition)).clone(),)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        result: tuple[Tensor] = self.network(sample, timestep, condition, return_dict=False)
        return result

    def _inputs(self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None) -> tuple[Any, ...]:
        if self._packed is not None:
            return sample, self.network.time_shifts(timestep, sample)
        if isinstance(self.network, DiffusionTransformer1D):
            self.network.position_embedding(sample.shape[1], sample)  # kept before the graph looks it up
            return sample, self.network.modulations(timestep, condition, sample)
        each = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample))
        return (sample, each) if condition is None else (sample, each, condition)

    def _autocast(self, device: torch.device) -> Any:
        autocasts = self._dtype is not None and self._packed is None
        return torch.autocast(device.type, dtype=self._dtype) if autocasts else nullcontext()

    def _fail(self, reason: str) -> None:
        warn_of_fallback(type(self.network).__name__, reason)
        self._has_failed, self._packed = True, None


class _Packed(nn.Module):
    """Copies of the weight and bias of one of a network's layers, active LoRAs added; `pack` brings the weight into
    another layout."""

    weight: Tensor
    bias: Tensor
    source_weight: Tensor
    source_bias: Tensor

    def __init__(self, network: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.name, self.dtype = name, dtype
        weight, bias = (tensor.detach().clone() for tensor in _weights(network.get_submodule(name)))
        self.register_buffer("source_weight", weight, persistent=False)
        self.register_buffer("source_bias", bias, persistent=False)
        for kind, packed in zip(("weight", "bias"), self.pack(weight, bias), strict=True):
            self.register_buffer(kind, packed, persistent=False)

    def pack(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight.clone(), bias.clone()

    def follow(self, network: nn.Module) -> None:
        weight, bias = _weights(network.get_submodule(self.name))
        if _are_equal(weight, self.source_weight) and _are_equal(bias, self.source_bias):
            return
        self.source_weight.copy_(weight)
        self.source_bias.copy_(bias)
        for kept, packed in zip((self.weight, self.bias), self.pack(self.source_weight, self.source_bias), strict=True):
            kept.copy_(packed)


class _Conv(_Packed):
    """A convolution over the steps of `(batch, steps, channels)`."""

    def __init__(self, network: nn.Module, name: str, dtype: torch.dtype | None) -> None:
        layer: Any = _base(network.get_submodule(name))
        self.stride, self.padding, self.is_pointwise = layer.stride[0], layer.padding[0], layer.kernel_size[0] == 1
        super().__init__(network, name, dtype)

    def pack(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = weight.to(self.dtype or weight.dtype), bias.to(self.dtype or bias.dtype).clone()
        if self.is_pointwise:
            return weight[:, :, 0].clone(), bias
        return weight[:, :, None].contiguous(memory_format=torch.channels_last), bias

    def forward(self, x: Tensor) -> Tensor:
        if self.is_pointwise:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        flat = x.to(self.weight.dtype).mT[:, :, None]
        return F.conv2d(flat, self.weight, self.bias, (1, self.stride), (0, self.padding))[:, :, 0].mT.to(x.dtype)


class _Double(_Conv):
    """A transposed convolution of kernel 4, stride 2 and padding 1: one of kernel 3 that gives even steps `x_i w_1 +
    x_{i-1} w_3` and odd ones `x_i w_2 + x_{i+1} w_0` side by side."""

    def __init__(self, network: nn.Module, name: str, dtype: torch.dtype | None) -> None:
        super().__init__(network, name, dtype)
        self.stride = 1

    def pack(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        w_0, w_1, w_2, w_3 = weight.transpose(0, 1).unbind(-1)
        zero = torch.zeros_like(w_0)
        even, odd = torch.stack([w_3, w_1, zero], dim=-1), torch.stack([zero, w_2, w_0], dim=-1)
        return super().pack(torch.cat([even, odd]), bias.repeat(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x).unflatten(-1, (2, -1)).flatten(1, 2)
        return result


class _NormAndMish(_Packed):
    """Group norm and Mish of `(batch, steps, channels)`."""

    def __init__(self, network: nn.Module, name: str) -> None:
        layer: Any = network.get_submodule(name)
        self.groups, self.eps = layer.num_groups, layer.eps
        super().__init__(network, name)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, -1))
        mean = grouped.mean((1, 3), keepdim=True)
        variance = (grouped * grouped).mean((1, 3), keepdim=True) - mean * mean
        normalised = ((grouped - mean) * torch.rsqrt(variance.clamp(min=0) + self.eps)).flatten(2)
        return _mish(normalised * self.weight + self.bias)


class _Block(nn.Module):
    def __init__(self, network: nn.Module, name: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.conv_in, self.norm_in = (
            _Conv(network, f"{name}.block_in.0", dtype),
            _NormAndMish(network, f"{name}.block_in.1"),
        )
        self.conv_out = _Conv(network, f"{name}.block_out.0", dtype)
        self.norm_out = _NormAndMish(network, f"{name}.block_out.1")
        is_identity = isinstance(network.get_submodule(f"{name}.residual"), nn.Identity)
        self.residual = nn.Identity() if is_identity else _Conv(network, f"{name}.residual", dtype)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        hidden = self.norm_in(self.conv_in(x)) + shift.mT
        result: Tensor = self.norm_out(self.conv_out(hidden)) + self.residual(x)
        return result


class _Level(nn.Module):
    def __init__(self, network: nn.Module, name: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.first, self.second = _Block(network, f"{name}.first", dtype), _Block(network, f"{name}.second", dtype)
        resample = _base(network.get_submodule(f"{name}.resample"))
        kind = _Double if isinstance(resample, nn.ConvTranspose1d) else _Conv
        is_identity = isinstance(resample, nn.Identity)
        self.resample = nn.Identity() if is_identity else kind(network, f"{name}.resample", dtype)

    def forward(self, x: Tensor, shifts: tuple[Tensor, Tensor], draft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.first(x, shifts[0])
        x = self.second(x if draft is None else x + draft, shifts[1])
        return self.resample(x), x


class ChannelsLastUnet(nn.Module):
    """What `TemporalUnet.denoise` computes, on `(batch, steps, channels)`: convolutions in the layout of their inputs,
    with what lies between them in a form that the compiler fuses.

    It holds copies of the network's weights, active LoRAs added.

    Args:
        network: the original.
        dtype: of the convolutions; that of the weights by default.
    """

    def __init__(self, network: TemporalUnet, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.widths = network.config.transition_dim, network.config.draft_dim
        self.down = nn.ModuleList(_Level(network, f"down.{i}", dtype) for i in range(len(network.down)))
        self.middle = _Level(network, "middle", dtype)
        self.up = nn.ModuleList(_Level(network, f"up.{i}", dtype) for i in range(len(network.up)))
        self.head_in, self.head_norm = _Conv(network, "head.0.0", dtype), _NormAndMish(network, "head.0.1")
        self.head_out = _Conv(network, "head.1", dtype)
        self.draft = None if network.draft_projection is None else _Conv(network, "draft_projection", dtype)

    def follow(self, network: nn.Module) -> bool:
        """Take over what has changed; False if an adapter cannot be added to the weights."""
        if any(_is_dora(module) for module in network.modules()):
            return False
        self.to(device_of(network))
        for part in self.modules():
            if isinstance(part, _Packed):
                part.follow(network)
        return True

    def forward(self, sample: Tensor, shifts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """As `TemporalUnet.denoise`."""
        x, draft = sample.split(self.widths, dim=-1)
        extra = None if self.draft is None else self.draft(draft)
        skips: list[Tensor] = []
        remaining = iter(shifts)
        for level in self.down:
            x, before = level(x, next(remaining), extra)
            skips.append(before)
            extra = None
        x, _ = self.middle(x, next(remaining))
        for level in self.up:
            x, _ = level(torch.cat([x, skips.pop()], dim=-1), next(remaining))
        result: Tensor = self.head_out(self.head_norm(self.head_in(x)))
        return result


def fused_denoise(network: DiffusionTransformer1D, sample: Tensor, modulations: list[Tensor]) -> Tensor:
    """What `DiffusionTransformer1D.denoise` computes, with its norms and GELU in a form that the compiler fuses."""
    sample, draft = sample.split((network.config.token_dim, network.config.draft_dim), dim=-1)
    x = network.token_projection(sample.contiguous()) + network.position_embedding(sample.shape[1], sample)
    if network.draft_projection is not None:
        x = x + network.draft_projection(draft)
    blocks: Any = network.blocks
    for block, modulation in zip(blocks, modulations):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        hidden = modulate(_norm(x, block.norm_attention.eps), shift_a, scale_a)
        x = (hidden if block.normalized_residual else x) + gate_a[:, None] * block.attention(hidden)
        hidden = modulate(_norm(x, block.norm_mlp.eps), shift_m, scale_m)
        x = x + gate_m[:, None] * block.mlp[2](_gelu(block.mlp[0](hidden)))
    shift, scale = modulations[-1].chunk(2, dim=-1)
    result: Tensor = network.head(modulate(_norm(x, network.norm.eps), shift, scale))
    return result


def _norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights: torch's own becomes Welford's sums, which use no vector instructions."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)


def _gelu(x: Tensor) -> Tensor:
    """GELU's approximation by tanh with one exponential: `(1 + tanh u) / 2 = sigmoid(2 u)`."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))


def warn_of_fallback(what: str, reason: str) -> None:
    """Say that something is not compiled and computes as before."""
    warnings.warn(f"{what} is not compiled and computes as before: {reason}.", CompilationWarning, stacklevel=3)


def missing_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for the device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed"
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return f"there is no C++ compiler ({str(error).splitlines()[0]})"
    return None


def device_of(network: nn.Module) -> torch.device:
    """Of the first parameter."""
    return next(network.parameters()).device


def _mish(x: Tensor) -> Tensor:
    """`x tanh(log(1 + e^x))` with one exponential: `x n / (n + 2)` with `n = e^x (e^x + 2)`."""
    e = torch.exp(x.clamp(max=20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def _base(layer: nn.Module) -> Any:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _are_equal(some: Tensor, other: Tensor) -> bool:
    return some.dtype == other.dtype and torch.equal(some, other)


def _is_dora(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and any(getattr(module, "use_dora", {}).values())


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias that a layer computes with, its active LoRAs added."""
    weight, bias = _base(layer).weight, _base(layer).bias
    if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters and not layer.merged:
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name) if name in layer.lora_A else weight
    return weight, bias
