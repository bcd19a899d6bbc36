"""Built on the meta device, the published models have exactly the published tensors."""

import pytest
import torch

from deployments.world_model import PRESETS
from deployments.world_model.checkpoint import manifest
from deployments.world_model.tokenizer import build_tokenizer

Shapes = dict[str, tuple[int, ...]]


def published_denoiser(width: int, blocks: int) -> Shapes:
    """The keys and shapes of a DreamDojo checkpoint, prefix `net.`."""
    wide, wider, head, rank, context = 3 * width, 4 * width, 128, 256, 1024
    top: Shapes = {
        "x_embedder.proj.1.weight": (width, 72),
        "t_embedder.1.linear_1.weight": (width, width),
        "t_embedder.1.linear_2.weight": (wide, width),
        "t_embedding_norm.weight": (width,),
        "crossattn_proj.0.weight": (context, 100_352),
        "crossattn_proj.0.bias": (context,),
        "final_layer.linear.weight": (64, width),
        "final_layer.adaln_modulation.1.weight": (rank, width),
        "final_layer.adaln_modulation.2.weight": (2 * width, rank),
    }
    for name, out in (("B_D", width), ("B_3D", wide)):
        top[f"action_embedder_{name}.fc1.weight"] = (wider, 1536)
        top[f"action_embedder_{name}.fc1.bias"] = (wider,)
        top[f"action_embedder_{name}.fc2.weight"] = (out, wider)
        top[f"action_embedder_{name}.fc2.bias"] = (out,)
    block: Shapes = {"mlp.layer1.weight": (wider, width), "mlp.layer2.weight": (width, wider)}
    for attn, keys in (("self_attn", width), ("cross_attn", context)):
        for name, features in (("q", width), ("k", keys), ("v", keys), ("output", width)):
            block[f"{attn}.{name}_proj.weight"] = (width, features)
        for name in ("q", "k"):
            block[f"{attn}.{name}_norm.weight"] = (head,)
    for part in ("self_attn", "cross_attn", "mlp"):
        block[f"adaln_modulation_{part}.1.weight"] = (rank, width)
        block[f"adaln_modulation_{part}.2.weight"] = (wide, rank)
    return top | {f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}


def published_tokenizer() -> Shapes:
    """The keys and shapes of `Wan2.1_VAE.pth`."""
    shapes: Shapes = {}

    def conv(name: str, out: int, features: int, *kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, features, *kernel)
        shapes[f"{name}.bias"] = (out,)

    def residual(name: str, features: int, out: int) -> None:
        shapes[f"{name}.residual.0.gamma"] = (features, 1, 1, 1)
        conv(f"{name}.residual.2", out, features, 3, 3, 3)
        shapes[f"{name}.residual.3.gamma"] = (out, 1, 1, 1)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if features != out:
            conv(f"{name}.shortcut", out, features, 1, 1, 1)

    def middle(name: str) -> None:
        residual(f"{name}.0", 384, 384)
        shapes[f"{name}.1.norm.gamma"] = (384, 1, 1)
        conv(f"{name}.1.to_qkv", 1152, 384, 1, 1)
        conv(f"{name}.1.proj", 384, 384, 1, 1)
        residual(f"{name}.2", 384, 384)

    def head(name: str, features: int, out: int) -> None:
        shapes[f"{name}.0.gamma"] = (features, 1, 1, 1)
        conv(f"{name}.2", out, features, 3, 3, 3)

    conv("encoder.conv1", 96, 3, 3, 3, 3)
    down = "encoder.downsamples"
    for index, (features, out) in {0: (96, 96), 1: (96, 96), 3: (96, 192), 4: (192, 192), 6: (192, 384), 7: (384, 384),
                                   9: (384, 384), 10: (384, 384)}.items():  # fmt: skip
        residual(f"{down}.{index}", features, out)
    for index, features in {2: 96, 5: 192, 8: 384}.items():
        conv(f"{down}.{index}.resample.1", features, features, 3, 3)
    for index, features in {5: 192, 8: 384}.items():
        conv(f"{down}.{index}.time_conv", features, features, 3, 1, 1)
    middle("encoder.middle")
    head("encoder.head", 384, 32)
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    conv("decoder.conv1", 384, 16, 3, 3, 3)
    middle("decoder.middle")
    up = "decoder.upsamples"
    for index in (0, 1, 2, 5, 6):
        residual(f"{up}.{index}", 384, 384)
    residual(f"{up}.4", 192, 384)
    for index in (8, 9, 10):
        residual(f"{up}.{index}", 192, 192)
    for index in (12, 13, 14):
        residual(f"{up}.{index}", 96, 96)
    for index, features in {3: 384, 7: 384, 11: 192}.items():
        conv(f"{up}.{index}.resample.1", features // 2, features, 3, 3)
    for index in (3, 7):
        conv(f"{up}.{index}.time_conv", 768, 384, 3, 1, 1)
    head("decoder.head", 96, 3)
    return shapes


@pytest.mark.parametrize(("name", "width", "blocks"), [("dreamdojo-2b", 2048, 28), ("dreamdojo-14b", 5120, 36)])
def test_a_dreamdojo_checkpoint_has_exactly_the_published_tensors(name: str, width: int, blocks: int) -> None:
    expected = {f"net.{key}": shape for key, shape in published_denoiser(width, blocks).items()}
    expected |= {f"tokenizer.{key}": shape for key, shape in published_tokenizer().items()}
    assert manifest(PRESETS[name]) == expected


def test_the_published_tokenizer_has_194_tensors_and_126_9_million_parameters() -> None:
    assert len(published_tokenizer()) == 194
    with torch.device("meta"):
        tokenizer = build_tokenizer(PRESETS["dreamdojo-2b"])
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == pytest.approx(126.9e6, rel=1e-3)
