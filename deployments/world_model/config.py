"""What a world model is made of, as values: architecture, tokenizer, sampler, and the presets that ship.

Knows no tensors and no files. Every dataclass is frozen and goes to and from plain JSON (`to_json`, `from_json`);
reading is strict, so a configuration written by another version is refused and not half understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

T = TypeVar("T")

MAX_NUM_STEPS = 100  # denoising steps per chunk: the bound on the work that one chunk can ask for
MAX_GUIDANCE = 20.0


@dataclass(frozen=True)
class DiTConfig:
    """The denoiser. Names follow the published checkpoints; see `dit.py` for what each part does."""

    latent_channels: int
    width: int
    num_blocks: int
    num_heads: int
    mlp_ratio: float
    adaln_rank: int
    text_dim: int  # features per token of the text encoder whose constant output is the context
    text_tokens: int
    context_dim: int
    patch_spatial: int = 2
    rope_theta: float = 10_000.0
    rope_ratio_t: float = 1.0  # NTK extrapolation ratios; 3.0 on h and w is what DreamDojo was trained with
    rope_ratio_h: float = 1.0
    rope_ratio_w: float = 1.0
    timestep_scale: float = 1e-3  # multiplies int(sigma * 1000) before the sinusoid

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True)
class TokenizerConfig:
    """The video autoencoder: `patch` is the small one of `tokenizer.py`, `wan` the published Wan2.1 VAE of `vae.py`."""

    kind: Literal["patch", "wan"]
    latent_channels: int
    spatial_compression: int
    width: int
    num_blocks: int

    def __post_init__(self) -> None:
        if self.kind not in ("patch", "wan"):
            raise ValueError(f"there is no {self.kind!r} tokenizer")
        if self.kind == "wan" and (self.latent_channels, self.spatial_compression) != (16, 8):
            raise ValueError("the Wan tokenizer has 16 latent channels and a spatial compression of 8")


@dataclass(frozen=True)
class SamplerConfig:
    """Rectified flow: x_sigma = (1 - sigma) * clean + sigma * noise, integrated from `sigma_max` to 0."""

    solver: Literal["unipc", "euler"] = "unipc"
    shift: float = 5.0  # sigma' = shift * sigma / (1 + (shift - 1) * sigma): more steps at high noise
    sigma_max: float = 0.999  # before the shift
    prediction: Literal["velocity", "clean"] = "velocity"  # what the network's output means


@dataclass(frozen=True)
class Embodiment:
    """Which columns of the action vector a robot fills; the model is trained with zeros in all others."""

    name: str
    first: int
    count: int
    limit: float | None  # actions are clipped to [-limit, limit]; None for no clipping

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class WorldModelConfig:
    """Everything needed to build a model and to call it; stored beside its weights."""

    name: str
    resolution: tuple[int, int]  # (H, W) in pixels
    action_dim: int
    embodiment: Embodiment
    dit: DiTConfig
    tokenizer: TokenizerConfig
    sampler: SamplerConfig
    default_num_steps: int
    default_guidance: float
    dtype: Literal["float32", "bfloat16"]  # of weights and activations on an accelerator; a CPU runs float32
    chunk_size: int = 12  # actions per chunk, and frames after the conditioning frame
    temporal_compression: int = 4
    fps: int = 10

    def __post_init__(self) -> None:
        if self.chunk_size % self.temporal_compression:
            raise ValueError(f"chunk_size {self.chunk_size} is no multiple of {self.temporal_compression}")
        if self.tokenizer.kind == "wan" and self.temporal_compression != 4:
            raise ValueError("the Wan tokenizer has a temporal compression of 4")
        if self.dit.latent_channels != self.tokenizer.latent_channels:
            raise ValueError("the DiT and the tokenizer disagree on latent_channels")
        if self.embodiment.first + self.embodiment.count > self.action_dim:
            raise ValueError(f"embodiment {self.embodiment.name} does not fit in {self.action_dim} action columns")

    @property
    def latent_frames(self) -> int:
        """Latent frames per chunk: the conditioning frame and chunk_size / temporal_compression new ones."""
        return 1 + self.chunk_size // self.temporal_compression

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one chunk's latents."""
        height, width = (side // self.tokenizer.spatial_compression for side in self.resolution)
        return self.tokenizer.latent_channels, self.latent_frames, height, width

    @property
    def grouped_action_dim(self) -> int:
        """Width of the action vector of one latent frame."""
        return self.action_dim * self.temporal_compression

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "resolution": list(self.resolution)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorldModelConfig:
        """Raises ValueError naming the first unknown or missing field, or the value that does not fit."""
        nested = {
            "embodiment": _build(Embodiment, data.get("embodiment")),
            "dit": _build(DiTConfig, data.get("dit")),
            "tokenizer": _build(TokenizerConfig, data.get("tokenizer")),
            "sampler": _build(SamplerConfig, data.get("sampler")),
        }
        height, width = data.get("resolution", (0, 0))
        return _build(cls, {**data, **nested, "resolution": (int(height), int(width))})


def _build(cls: type[T], data: Any) -> T:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is missing")
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - names):
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}")
    if missing := sorted(names - set(data)):
        raise ValueError(f"{cls.__name__} lacks the field {missing[0]!r}")
    return cls(**data)


TINY_PUSHER = WorldModelConfig(
    name="tiny-pusher",
    resolution=(64, 64),
    action_dim=8,
    embodiment=Embodiment(name="pusher", first=0, count=2, limit=1.0),
    dit=DiTConfig(
        latent_channels=24,
        width=160,
        num_blocks=6,
        num_heads=5,
        mlp_ratio=4.0,
        adaln_rank=32,
        text_dim=32,
        text_tokens=1,  # the empty prompt is constant, and equal tokens attend as one
        context_dim=32,
        timestep_scale=1.0,
    ),
    tokenizer=TokenizerConfig(kind="patch", latent_channels=24, spatial_compression=8, width=112, num_blocks=3),
    # The toy's tokens are nearly as wide as the network, which could not carry their noise through to a velocity.
    sampler=SamplerConfig(prediction="clean"),
    default_num_steps=4,
    default_guidance=0.0,
    dtype="float32",
)

# The published models' actions have 384 columns, and each robot fills its own (NVIDIA/DreamDojo, docs/POSTTRAIN.md).
EMBODIMENTS: Mapping[str, Embodiment] = MappingProxyType(
    {
        robot.name: robot
        for robot in (
            # left arm 7, right arm 7, left hand 6, right hand 6, waist 3
            Embodiment(name="gr1", first=0, count=29, limit=None),
            # left leg 6, right leg 6, waist 3, left arm 7, left hand 7, right arm 7, right hand 7
            Embodiment(name="g1", first=58, count=43, limit=None),
            # end effector poses 16 and 16, grippers 1 and 1, joints 6 and 6, left before right
            Embodiment(name="yam", first=101, count=46, limit=None),
            # left arm 7, right arm 7, effectors 1 and 1, head 2, waist pitch 1, waist lift 1, base velocity 2
            Embodiment(name="agibot", first=147, count=22, limit=None),
        )
    }
)

# True figures of the published 2B model; the GR-1 columns are those of its first post-trained checkpoint.
DREAMDOJO_2B = WorldModelConfig(
    name="dreamdojo-2b",
    resolution=(480, 640),
    action_dim=384,
    embodiment=EMBODIMENTS["gr1"],
    dit=DiTConfig(
        latent_channels=16,
        width=2048,
        num_blocks=28,
        num_heads=16,
        mlp_ratio=4.0,
        adaln_rank=256,
        text_dim=100_352,  # 28 layers of 3,584 features
        text_tokens=512,
        context_dim=1024,
        rope_ratio_h=3.0,
        rope_ratio_w=3.0,
    ),
    tokenizer=TokenizerConfig(kind="wan", latent_channels=16, spatial_compression=8, width=96, num_blocks=2),
    sampler=SamplerConfig(),
    default_num_steps=35,
    default_guidance=0.0,
    dtype="bfloat16",
)

DREAMDOJO_14B = replace(
    DREAMDOJO_2B,
    name="dreamdojo-14b",
    dit=replace(DREAMDOJO_2B.dit, width=5120, num_blocks=36, num_heads=40),
)

PRESETS: Mapping[str, WorldModelConfig] = MappingProxyType(
    {preset.name: preset for preset in (TINY_PUSHER, DREAMDOJO_2B, DREAMDOJO_14B)}
)
