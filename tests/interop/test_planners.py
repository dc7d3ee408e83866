"""Planners of diffusers and of CleanDiffuser compute here what they compute there."""

import itertools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet1DModel
from peft import LoraConfig
from torch import Tensor, nn

from dmc_hub.interop import (
    InteropError,
    cleandiffuser_scheduler,
    import_cleandiffuser_planner,
    import_value_guided_planner,
)
from dmc_hub.models.inverse_dynamics import InverseDynamics
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline

OBSERVATION_DIM, ACTION_DIM, HORIZON = 5, 2, 8
WIDTH = OBSERVATION_DIM + ACTION_DIM


@pytest.fixture
def normalizer() -> Normalizer:
    rng = np.random.default_rng(0)
    return Normalizer.from_data(
        rng.normal(size=(50, OBSERVATION_DIM)).astype(np.float32),
        rng.normal(size=(50, ACTION_DIM)).astype(np.float32),
        "gaussian",
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module) -> None:
    """Weights as after training: none of them zero or one."""
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


# ---- diffusers -------------------------------------------------------------------------------------------


def diffusers_unet(widths: tuple[int, ...] = (32, 64, 256), **changes: Any) -> UNet1DModel:
    """The configuration of the published `ValueGuidedRLPipeline` repositories, narrower."""
    config: dict[str, Any] = {
        "sample_size": 65536,
        "in_channels": WIDTH,
        "out_channels": WIDTH,
        "extra_in_channels": 0,
        "block_out_channels": widths,
        "down_block_types": ("DownResnetBlock1D",) * len(widths),
        "up_block_types": ("UpResnetBlock1D",) * (len(widths) - 1),
        "mid_block_type": "MidResTemporalBlock1D",
        "out_block_type": "OutConv1DBlock",
        "time_embedding_type": "positional",
        "use_timestep_embedding": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "mish",
        "norm_num_groups": 8,
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    model = UNet1DModel(**{**config, **changes})
    randomize(model)
    return model.eval()


def save_repository(folder: Path, model: UNet1DModel, *, safetensors: bool = True, **scheduler: Any) -> Path:
    model.save_pretrained(folder / "unet", safe_serialization=safetensors)
    options = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "prediction_type": "sample", **scheduler}
    DDPMScheduler(20, variance_type="fixed_small_log", **options).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("widths", [(32, 64, 256), (32, 64)])
@pytest.mark.parametrize("safetensors", [True, False])
def test_unet_1d_model_computes_the_same(
    tmp_path: Path, normalizer: Normalizer, widths: tuple[int, ...], safetensors: bool
) -> None:
    theirs = diffusers_unet(widths)
    planner = import_value_guided_planner(
        save_repository(tmp_path, theirs, safetensors=safetensors), normalizer=normalizer, horizon=HORIZON
    )
    observations_first, timestep = draw(4, HORIZON, WIDTH), torch.tensor([0, 3, 11, 19])
    actions_first = torch.cat(
        [observations_first[..., OBSERVATION_DIM:], observations_first[..., :OBSERVATION_DIM]], dim=-1
    )
    with torch.no_grad():
        actual = planner.denoiser(observations_first, timestep).sample
        expected = theirs(actions_first.transpose(1, 2), timestep).sample.transpose(1, 2)
    torch.testing.assert_close(actual[..., :OBSERVATION_DIM], expected[..., ACTION_DIM:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[..., OBSERVATION_DIM:], expected[..., :ACTION_DIM], rtol=1e-5, atol=1e-5)


def test_denoising_is_that_of_diffusers(tmp_path: Path, normalizer: Normalizer) -> None:
    theirs = diffusers_unet((32, 64))
    planner = import_value_guided_planner(
        save_repository(tmp_path, theirs), normalizer=normalizer, horizon=HORIZON, num_inference_steps=10
    )
    stock = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    condition = planner.observation_condition(draw(3, OBSERVATION_DIM, seed=1))
    actual = planner.sample(condition, generator=torch.Generator().manual_seed(2))
    planner.scheduler = stock
    expected = planner.sample(condition, num_inference_steps=10, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_imported_planner_acts_takes_a_lora_and_is_saved(tmp_path: Path, normalizer: Normalizer) -> None:
    folder = save_repository(tmp_path / "theirs", diffusers_unet((32, 64)))
    planner = import_value_guided_planner(folder, normalizer=normalizer, horizon=HORIZON)
    observation = draw(OBSERVATION_DIM).numpy()
    action = planner(observation, generator=0).action
    planner.add_lora(LoraConfig(r=2))
    np.testing.assert_array_equal(planner(observation, generator=0).action, action)
    planner.unload_lora()
    planner.save_pretrained(tmp_path / "ours")
    loaded = DiffuserPlannerPipeline.from_pretrained(tmp_path / "ours")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(loaded(observation, generator=0).action, action)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "silu"}, "`act_fn` must be 'mish', got 'silu'"),
        ({"flip_sin_to_cos": True}, "`flip_sin_to_cos` must be False"),
        ({"norm_num_groups": 4}, "`norm_num_groups` must be 8, got 4"),
    ],
)
def test_other_networks_are_refused(
    tmp_path: Path, normalizer: Normalizer, changes: dict[str, Any], message: str
) -> None:
    folder = save_repository(tmp_path, diffusers_unet((32, 64), **changes))
    with pytest.raises(InteropError, match=message):
        import_value_guided_planner(folder, normalizer=normalizer, horizon=HORIZON)


def test_other_schedules_are_refused(tmp_path: Path, normalizer: Normalizer) -> None:
    folder = save_repository(tmp_path, diffusers_unet((32, 64)), rescale_betas_zero_snr=True)
    with pytest.raises(InteropError, match="`rescale_betas_zero_snr` must be False"):
        import_value_guided_planner(folder, normalizer=normalizer, horizon=HORIZON)


def test_statistics_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = save_repository(tmp_path, diffusers_unet((32, 64)))
    data = np.zeros((2, 3), np.float32)
    with pytest.raises(InteropError, match="plans 7 numbers per step, but `normalizer` has 3 of an observation and 3"):
        import_value_guided_planner(folder, normalizer=Normalizer.from_data(data, data), horizon=HORIZON)


# ---- CleanDiffuser: its architecture, written down again --------------------------------------------------


class EdmEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        powers = torch.arange(0, self.dim // 2, dtype=torch.float32) / (self.dim // 2)
        angles = torch.outer(t.float(), (1 / 10000) ** powers)
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class SineEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rates = torch.exp(-np.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = torch.outer(t.float(), self.rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class GroupNorm1d(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.groups = min(8, dim // 4)
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x[:, :, None], self.groups, self.weight, self.bias)[:, :, 0]


class CleanBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), GroupNorm1d(outputs), nn.Mish()
        )
        self.conv2 = nn.Sequential(
            nn.Conv1d(outputs, outputs, kernel, padding=kernel // 2), GroupNorm1d(outputs), nn.Mish()
        )
        self.emb_mlp = nn.Sequential(nn.Mish(), nn.Linear(embedding, outputs))
        self.residual_conv = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv2(self.conv1(x) + self.emb_mlp(embedding)[..., None]) + self.residual_conv(x)


class Resample(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CleanUnet(nn.Module):
    """`JannerUNet1d(x_dim, emb_dim, model_dim, kernel_size, dim_mult)`: widths are products of the multipliers."""

    def __init__(self, width: int, emb_dim: int, dim: int, kernel: int, mults: tuple[int, ...]) -> None:
        super().__init__()
        dims = [width, *(dim * int(product) for product in np.cumprod(mults))]
        self.map_noise = EdmEmbedding(emb_dim)
        self.map_emb = nn.Sequential(nn.Linear(emb_dim, dim * 4), nn.Mish(), nn.Linear(dim * 4, dim))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (a, b) in enumerate(itertools.pairwise(dims)):
            last = level == len(mults) - 1
            half = nn.Identity() if last else Resample(nn.Conv1d(b, b, 3, 2, 1))
            blocks = [CleanBlock(a, b, dim, kernel), CleanBlock(b, b, dim, kernel)]
            self.downs.append(nn.ModuleList([*blocks, nn.Identity(), half]))
        self.mid_block1 = CleanBlock(dims[-1], dims[-1], dim, kernel)
        self.mid_block2 = CleanBlock(dims[-1], dims[-1], dim, kernel)
        for a, b in reversed(list(itertools.pairwise(dims[1:]))):
            blocks = [CleanBlock(b * 2, a, dim, kernel), CleanBlock(a, a, dim, kernel)]
            self.ups.append(nn.ModuleList([*blocks, nn.Identity(), Resample(nn.ConvTranspose1d(a, a, 4, 2, 1))]))
        self.final_conv = nn.Sequential(
            nn.Conv1d(dim, dim, 5, padding=2), GroupNorm1d(dim), nn.Mish(), nn.Conv1d(dim, width, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, embedding, skips = x.mT, self.map_emb(self.map_noise(t)), []
        for first, second, _, half in cast(Any, self.downs):
            x = second(first(x, embedding), embedding)
            skips.append(x)
            x = half(x)
        x = self.mid_block2(self.mid_block1(x, embedding), embedding)
        for first, second, _, double in cast(Any, self.ups):
            x = double(second(first(torch.cat([x, skips.pop()], 1), embedding), embedding))
        return self.final_conv(x).mT


class CleanDiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Dropout(0.0), nn.Linear(4 * dim, dim)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        a, b, c, d, e, f = (part[:, None] for part in self.adaLN_modulation(embedding).chunk(6, dim=1))
        x = self.norm1(x) * (1 + b) + a
        x = x + c * self.attn(x, x, x)[0]
        return x + f * self.mlp(self.norm2(x) * (1 + e) + d)


class CleanHead(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (part[:, None] for part in self.adaLN_modulation(embedding).chunk(2, dim=1))
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class CleanDiT(nn.Module):
    """`DiT1d(x_dim, emb_dim, d_model, n_heads, depth)`."""

    def __init__(self, width: int, emb_dim: int, dim: int, heads: int, depth: int, positions: str) -> None:
        super().__init__()
        self.map_noise = EdmEmbedding(emb_dim)
        self.pos_emb = EdmEmbedding(dim) if positions == "positional" else SineEmbedding(dim)
        self.x_proj = nn.Linear(width, dim)
        self.map_emb = nn.Sequential(nn.Linear(emb_dim, dim), nn.Mish(), nn.Linear(dim, dim), nn.Mish())
        self.blocks = nn.ModuleList(CleanDiTBlock(dim, heads) for _ in range(depth))
        self.final_layer = CleanHead(dim, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, embedding = self.x_proj(x) + self.pos_emb(torch.arange(x.shape[1])), self.map_emb(self.map_noise(t))
        for block in self.blocks:
            x = block(x, embedding)
        return self.final_layer(x, embedding)


def save_cleandiffuser(path: Path, model: nn.Module, **extra: Any) -> Path:
    ema = {f"diffusion.{name}": tensor for name, tensor in model.state_dict().items()}
    plain = {name: tensor + 1 for name, tensor in ema.items()}
    torch.save({"model": plain, "model_ema": ema, **extra}, path)
    return path


def clean_unet(kernel: int = 3, mults: tuple[int, ...] = (1, 2, 2), width: int = WIDTH) -> CleanUnet:
    torch.manual_seed(0)
    model = CleanUnet(width, 48, 32, kernel, mults)
    randomize(model)
    return model.eval()


def clean_dit(width: int = WIDTH, positions: str = "sinusoidal") -> CleanDiT:
    torch.manual_seed(0)
    model = CleanDiT(width, 24, 32, 4, 2, positions)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (clean_unet(3), "sinusoidal"),
        (clean_unet(5, (1, 4)), "sinusoidal"),
        (clean_dit(), "sinusoidal"),
        (clean_dit(positions="positional"), "positional"),
    ],
    ids=["unet-3", "unet-5", "dit", "later-dit"],
)
def test_cleandiffuser_computes_the_same(
    tmp_path: Path, normalizer: Normalizer, model: nn.Module, positions: str
) -> None:
    planner = import_cleandiffuser_planner(
        save_cleandiffuser(tmp_path / "model.pt", model),
        scheduler=cleandiffuser_scheduler(20),
        normalizer=normalizer,
        horizon=HORIZON,
        num_heads=4,
        position_embedding=positions,
    )
    plans, timestep = draw(4, HORIZON, WIDTH), torch.tensor([0, 3, 11, 19])
    with torch.no_grad():
        torch.testing.assert_close(
            planner.denoiser(plans, timestep).sample, model(plans, timestep), rtol=1e-5, atol=1e-5
        )
    assert planner(draw(OBSERVATION_DIM).numpy(), generator=0).action.shape == (ACTION_DIM,)


def test_cleandiffuser_weights_that_are_not_averaged(tmp_path: Path, normalizer: Normalizer) -> None:
    model = clean_unet()
    options: dict[str, Any] = {"scheduler": cleandiffuser_scheduler(20), "normalizer": normalizer, "horizon": HORIZON}
    path = save_cleandiffuser(tmp_path / "model.pt", model)
    planner = import_cleandiffuser_planner(path, use_ema=False, **options)
    torch.testing.assert_close(planner.denoiser.head[1].bias, cast(Tensor, model.final_conv[3].bias) + 1)


def test_cleandiffuser_planner_of_observations(tmp_path: Path, normalizer: Normalizer) -> None:
    options: dict[str, Any] = {
        "scheduler": cleandiffuser_scheduler(20),
        "normalizer": normalizer,
        "horizon": HORIZON,
        "num_heads": 4,
    }
    path = save_cleandiffuser(tmp_path / "model.pt", clean_dit(OBSERVATION_DIM))
    with pytest.raises(InteropError, match="plans 5 numbers per step, but `normalizer` has 5 of an observation and 2"):
        import_cleandiffuser_planner(path, **options)
    inverse_dynamics = InverseDynamics(OBSERVATION_DIM, ACTION_DIM, (8,))
    planner = import_cleandiffuser_planner(path, inverse_dynamics=inverse_dynamics, **options)
    assert planner(draw(OBSERVATION_DIM).numpy(), generator=0).action.shape == (ACTION_DIM,)


@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
def test_cleandiffuser_levels(noise_schedule: str) -> None:
    """alpha of level i at `t = eps + i (1 - eps) / (T - 1)`; its last cosine time is 0.9946."""
    scheduler = cleandiffuser_scheduler(20, noise_schedule=noise_schedule)
    for level in (0, 7, 19):
        t = 1e-3 + level * (1 - 1e-3) / 19
        if noise_schedule == "cosine":
            t = 0.9946 if level == 19 else t
            alpha = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
        else:
            alpha = np.exp(-(20 - 0.1) / 4 * t**2 - 0.1 / 2 * t)
        at = scheduler.coefficients(level, torch.zeros(1))
        assert float(at.alpha) == pytest.approx(alpha, rel=1e-9)
        assert float(at.sigma) == pytest.approx(np.sqrt(1 - alpha**2), rel=1e-7)


def test_cosine_with_too_many_levels_is_refused() -> None:
    with pytest.raises(InteropError, match=r"puts a time past 0.9946"):
        cleandiffuser_scheduler(1000)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, normalizer: Normalizer) -> None:
    path = save_cleandiffuser(tmp_path / "model.pt", clean_unet(), payload=Payload(tmp_path / "ran"))
    with pytest.raises(InteropError, match="is not unpickled"):
        import_cleandiffuser_planner(
            path, scheduler=cleandiffuser_scheduler(20), normalizer=normalizer, horizon=HORIZON
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("diffusion.map_emb.0.bias"), "time_embedding.0.bias is missing"),
        (lambda state: state.update({"diffusion.extra.weight": torch.ones(1)}), "extra.weight has no counterpart"),
        (lambda state: state.update({"diffusion.map_noise.freqs": torch.ones(1)}), "map_noise.freqs: Fourier"),
        (lambda state: state["diffusion.map_emb.0.bias"].fill_(float("nan")), "NaN or infinite entries in"),
        (lambda state: state.update({"diffusion.map_emb.0.bias": torch.ones(3)}), r"has shape \(3,\) instead of"),
        (lambda state: state.clear(), "does not hold a dictionary of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, normalizer: Normalizer, change: Any, message: str) -> None:
    path = save_cleandiffuser(tmp_path / "model.pt", clean_unet())
    content = torch.load(path, weights_only=True)
    change(content["model_ema"])
    torch.save(content, path)
    with pytest.raises(InteropError, match=message):
        import_cleandiffuser_planner(
            path, scheduler=cleandiffuser_scheduler(20), normalizer=normalizer, horizon=HORIZON
        )


def test_number_of_heads_has_to_be_given(tmp_path: Path, normalizer: Normalizer) -> None:
    path = save_cleandiffuser(tmp_path / "model.pt", clean_dit())
    options: dict[str, Any] = {"scheduler": cleandiffuser_scheduler(20), "normalizer": normalizer, "horizon": HORIZON}
    with pytest.raises(InteropError, match="`num_heads` is missing"):
        import_cleandiffuser_planner(path, **options)
    with pytest.raises(InteropError, match="`num_heads` must divide the width 32, got 5"):
        import_cleandiffuser_planner(path, num_heads=5, **options)


def test_damaged_files_are_refused(tmp_path: Path, normalizer: Normalizer) -> None:
    folder = save_repository(tmp_path, diffusers_unet((32, 64)))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InteropError, match="is damaged"):
        import_value_guided_planner(folder, normalizer=normalizer, horizon=HORIZON)
    (folder / "unet/config.json").write_text(json.dumps([1]))
    with pytest.raises(InteropError, match="does not hold a JSON object"):
        import_value_guided_planner(folder, normalizer=normalizer, horizon=HORIZON)


def test_default_network_is_as_before() -> None:
    """The options for networks of others leave this library's own alone."""
    model = TemporalUnet(14)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_956_302
