import math
from dataclasses import replace

import pytest
import torch

from deployments.world_model import PRESETS, WorldModelConfig
from deployments.world_model.dit import DiT, PatchEmbed, Sinusoid, unpatchify
from deployments.world_model.rope import axis_dims, rotary_tables, rotate

D, BLOCKS, HEAD = 2048, 28, 128

# The published 2B state dict, without its `net.` prefix.
PUBLISHED_TOP = {
    "x_embedder.proj.1.weight": (D, 72),
    "t_embedder.1.linear_1.weight": (D, D),
    "t_embedder.1.linear_2.weight": (3 * D, D),
    "t_embedding_norm.weight": (D,),
    "crossattn_proj.0.weight": (1024, 100_352),
    "crossattn_proj.0.bias": (1024,),
    "action_embedder_B_D.fc1.weight": (8192, 1536),
    "action_embedder_B_D.fc1.bias": (8192,),
    "action_embedder_B_D.fc2.weight": (D, 8192),
    "action_embedder_B_D.fc2.bias": (D,),
    "action_embedder_B_3D.fc1.weight": (8192, 1536),
    "action_embedder_B_3D.fc1.bias": (8192,),
    "action_embedder_B_3D.fc2.weight": (3 * D, 8192),
    "action_embedder_B_3D.fc2.bias": (3 * D,),
    "final_layer.linear.weight": (64, D),
    "final_layer.adaln_modulation.1.weight": (256, D),
    "final_layer.adaln_modulation.2.weight": (2 * D, 256),
}
PUBLISHED_BLOCK = {
    **{f"self_attn.{name}_proj.weight": (D, D) for name in ("q", "k", "v", "output")},
    **{f"cross_attn.{name}_proj.weight": (D, D) for name in ("q", "output")},
    **{f"cross_attn.{name}_proj.weight": (D, 1024) for name in ("k", "v")},
    **{f"{attn}.{name}_norm.weight": (HEAD,) for attn in ("self_attn", "cross_attn") for name in ("q", "k")},
    "mlp.layer1.weight": (8192, D),
    "mlp.layer2.weight": (D, 8192),
    **{f"adaln_modulation_{part}.1.weight": (256, D) for part in ("self_attn", "cross_attn", "mlp")},
    **{f"adaln_modulation_{part}.2.weight": (3 * D, 256) for part in ("self_attn", "cross_attn", "mlp")},
}


def test_dreamdojo_2b_has_exactly_the_published_tensors() -> None:
    config = PRESETS["dreamdojo-2b"]
    with torch.device("meta"):
        built = DiT(config.dit, config.grouped_action_dim).state_dict()
    blocks = {f"blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in PUBLISHED_BLOCK.items()}
    assert {name: tuple(tensor.shape) for name, tensor in built.items()} == PUBLISHED_TOP | blocks


def test_dreamdojo_2b_has_2_15_billion_parameters() -> None:
    config = PRESETS["dreamdojo-2b"]
    with torch.device("meta"):
        dit = DiT(config.dit, config.grouped_action_dim)
    assert sum(parameter.numel() for parameter in dit.parameters()) == pytest.approx(2.151e9, rel=1e-3)


@pytest.fixture
def dit(small_config: WorldModelConfig) -> DiT:
    torch.manual_seed(0)
    dit = DiT(small_config.dit, small_config.grouped_action_dim)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit.requires_grad_(False)


def forward(dit: DiT, *, actions: torch.Tensor, weight: float = 1.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, dit.config.latent_channels, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([[300.0, 500.0, 500.0, 700.0]])
    mask = torch.tensor([[1.0, 0, 0, 0]]) if mask is None else mask
    context = dit.context(torch.zeros(dit.config.text_tokens, dit.config.text_dim))
    out: torch.Tensor = dit(x, mask, timesteps, actions, torch.tensor([weight]), context)
    return out


def test_the_output_has_the_shape_of_the_latents(dit: DiT) -> None:
    assert forward(dit, actions=torch.zeros(1, 3, 32)).shape == (1, dit.config.latent_channels, 4, 8, 8)


def test_every_action_group_changes_the_output(dit: DiT) -> None:
    still = forward(dit, actions=torch.zeros(1, 3, 32))
    for group in range(3):
        actions = torch.zeros(1, 3, 32)
        actions[0, group] = 1
        assert not torch.allclose(forward(dit, actions=actions), still)


def test_the_unconditional_pass_sees_no_action(dit: DiT) -> None:
    first = forward(dit, actions=torch.zeros(1, 3, 32), weight=0.0)
    second = forward(dit, actions=torch.ones(1, 3, 32), weight=0.0)
    assert torch.equal(first, second)
    assert not torch.equal(first, forward(dit, actions=torch.zeros(1, 3, 32)))


def test_the_mask_tells_the_given_frame_from_the_others(dit: DiT) -> None:
    actions = torch.zeros(1, 3, 32)
    assert not torch.allclose(forward(dit, actions=actions), forward(dit, actions=actions, mask=torch.zeros(1, 4)))


def test_equal_text_tokens_attend_as_one(dit: DiT, small_config: WorldModelConfig) -> None:
    actions = torch.zeros(1, 3, 32)
    one = forward(dit, actions=actions)
    dit.config = replace(small_config.dit, text_tokens=5)
    torch.testing.assert_close(forward(dit, actions=actions), one)


def test_patches_are_flattened_channel_major(small_config: WorldModelConfig) -> None:
    """Feature (c, m, n) of a token comes from channel c, row m and column n of its patch."""
    config = small_config.dit
    channels = config.latent_channels
    embed = PatchEmbed(replace(config, width=4 * (channels + 2), num_heads=1))
    torch.nn.init.eye_(embed.proj[1].weight)  # type: ignore[arg-type]
    x = torch.arange(channels * 8 * 8, dtype=torch.float32).view(1, channels, 1, 8, 8)
    tokens = embed(x, torch.ones(1, 1))
    token = tokens[0, 0, 4 * 1 + 2]  # second row of patches, third column
    assert token[:4].tolist() == [x[0, 0, 0, 2, 4], x[0, 0, 0, 2, 5], x[0, 0, 0, 3, 4], x[0, 0, 0, 3, 5]]
    assert token[4 * channels :].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # condition mask, padding mask


def test_unpatchify_takes_the_channel_as_the_fastest_axis() -> None:
    patches = torch.arange(2 * 2 * 3, dtype=torch.float32).view(1, 1, 1, 1, 12)  # p1, p2, C
    image = unpatchify(patches, 2)
    assert image.shape == (1, 3, 1, 2, 2)
    assert image[0, 1, 0].tolist() == [[1, 4], [7, 10]]


def test_the_sinusoid_is_cosines_then_sines() -> None:
    features = Sinusoid(4)(torch.tensor([[2.0]]))[0, 0]
    expected = [math.cos(2), math.cos(2 / 100), math.sin(2), math.sin(2 / 100)]
    assert features.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("head_dim", "dims"), [(128, (44, 42, 42)), (32, (12, 10, 10))])
def test_rope_splits_a_head_between_time_height_and_width(head_dim: int, dims: tuple[int, int, int]) -> None:
    assert axis_dims(head_dim) == dims


def test_rope_stretches_height_and_width_by_ntk() -> None:
    """Ratio 3 over 42 dimensions raises theta from 10,000 to 31,697."""
    config = PRESETS["dreamdojo-2b"].dit
    cos_N1D, sin_N1D = rotary_tables(config, (4, 30, 40), torch.device("cpu"))
    index = (2 * 30 + 7) * 40 + 11  # token t=2, h=7, w=11
    angles = torch.atan2(sin_N1D[index, 0], cos_N1D[index, 0])
    time = 2 * 10_000 ** (-torch.arange(0, 44, 2) / 44)
    height = 7 * 31_697 ** (-torch.arange(0, 42, 2) / 42)
    width = 11 * 31_697 ** (-torch.arange(0, 42, 2) / 42)
    expected = torch.cat((time, height, width)).repeat(2)
    torch.testing.assert_close(angles.cos(), expected.cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(angles.sin(), expected.sin(), atol=1e-3, rtol=0)


def test_rope_makes_attention_depend_on_relative_position_only(small_config: WorldModelConfig) -> None:
    config = replace(small_config.dit, width=32, num_heads=1)
    tables = rotary_tables(config, (4, 4, 4), torch.device("cpu"))
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    rotated_q = rotate(q.expand(1, 64, 1, 32), tables)[0, :, 0]
    rotated_k = rotate(k.expand(1, 64, 1, 32), tables)[0, :, 0]
    scores = (rotated_q @ rotated_k.T).view(4, 4, 4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 1, 2, 1, 0, 2], scores[2, 3, 1, 3, 2, 1])
