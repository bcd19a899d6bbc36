"""The models this product knows, and their true figures. An entry is served once weights are configured for it.

Figures of DreamDojo are those of its published code and paper (NVIDIA/DreamDojo, arXiv 2602.06949). Benchmark blocks
hold what was measured on this implementation and are empty until it is.
"""

from collections.abc import Mapping
from pathlib import Path

import deployments
from billing.money import Mils, usd
from deployments.messages import ModelSpec
from serve_app.schemas import MAX_GUIDANCE, MAX_NUM_STEPS, CatalogEntry, CatalogSpec, UpstreamProvider

DEFAULT_MODEL = "tiny-pusher"
STUDENT = "tiny-pusher-student"
PACKAGED_CHECKPOINTS: Mapping[str, Path] = {
    slug: Path(deployments.__file__).parent / "world_model" / "checkpoints" / slug for slug in (DEFAULT_MODEL, STUDENT)
}
RUNNERS: Mapping[str, str] = {
    "world_model": "deployments.world_model.rollout:WorldModel.load",
    "causal_student": "deployments.world_model.streaming:StreamingWorldModel.load",
}
"""By the name that an entry has for what runs it: the `module:callable` that makes it of a checkpoint and a device."""
STUDENT_PASSES = 4
"""Denoising passes of a latent frame, at most: `causal.SIGMAS`."""

MILS_PER_FRAME = Mils(5)
"""The list price of every model here, $0.0005, while the price book has none."""
FRAMES_PER_SECOND = 10
STANDARD_FRAMES = 49
"""Of the standard rollout: 48 actions."""

_NVIDIA = UpstreamProvider(
    key="nvidia",
    name="NVIDIA",
    short_name="NVIDIA",
    homepage="https://github.com/NVIDIA/DreamDojo",
    huggingface_org="nvidia",
)
_OURS = UpstreamProvider(key="dream-engine", name="Dream Engine", short_name="Dream Engine")


def _dreamdojo(slug: str, embodiment: str, robot: str, action_slots: str, checkpoint: str) -> CatalogEntry:
    return CatalogEntry(
        slug=slug,
        name=f"DreamDojo 2B · {embodiment}",
        provider="dream-engine-cluster",
        upstream_provider=_NVIDIA,
        category="Robotics",
        summary=f"DreamDojo 2B post-trained on {robot}: a start frame and actions in, 12 frames per chunk out.",
        description=(
            "An action-conditioned video diffusion transformer (28 blocks, width 2048) over Wan2.1 latents. Each chunk "
            "of 12 actions gives 12 frames at 10 Hz, conditioned on the last frame of the chunk before."
        ),
        intended_use=f"Rolling out candidate action sequences of {robot}; {action_slots} of the 384 action slots.",
        training_data="NVIDIA's human-video pretraining mixture, then robot episodes of this embodiment.",
        license="NVIDIA Open Model License (weights); code of this implementation Apache-2.0",
        links={"code": "https://github.com/NVIDIA/DreamDojo", "paper": "https://arxiv.org/abs/2602.06949"},
        price_per_frame_usd=usd(MILS_PER_FRAME),
        is_flagship=embodiment == "GR-1",
        spec=CatalogSpec(
            model_size="2B",
            embodiment=embodiment,
            action_dim=384,
            chunk_size=12,
            resolution=(480, 640),
            default_num_steps=35,
            default_guidance=0.0,
            runner="world_model",
            encoder_name="Wan2.1 VAE",
            temporal_compression=4,
            ckpt_repo=f"nvidia/DreamDojo/{checkpoint}",
            base_model="nvidia/Cosmos-Predict2.5-2B",
            tokenizer="Wan2.1_VAE",
        ),
    )


CATALOG: Mapping[str, CatalogEntry] = {
    entry.slug: entry
    for entry in (
        CatalogEntry(
            slug="tiny-pusher",
            name="Tiny Pusher",
            provider="dream-engine-cluster",
            upstream_provider=_OURS,
            category="Simulation",
            summary="A small world model of a 2-D pushing task, of DreamDojo's design, that runs on a laptop.",
            description=(
                "An agent disc pushes a puck on a 64x64 table. Same transformer, conditioning, sampler and chunk loop "
                "as the large models, with a small tokenizer; trained in this repository on a simulator it ships."
            ),
            intended_use="Trying the service, testing planners, and proving the cluster without a GPU.",
            training_data="Episodes of the pusher simulator in deployments/world_model/pusher.py.",
            license="Apache-2.0",
            links={},
            price_per_frame_usd=usd(MILS_PER_FRAME),
            spec=CatalogSpec(
                model_size="tiny",
                embodiment="pusher",
                action_dim=8,
                chunk_size=12,
                resolution=(64, 64),
                default_num_steps=4,
                default_guidance=0.0,
                runner="world_model",
                encoder_name="PatchTokenizer",
                temporal_compression=4,
            ),
        ),
        CatalogEntry(
            slug=STUDENT,
            name="Tiny Pusher, causal student",
            provider="dream-engine-cluster",
            upstream_provider=_OURS,
            category="Simulation",
            summary="Tiny Pusher's student for sessions and streams: four frames leave at a time, in one pass.",
            description=(
                "The same network as tiny-pusher, trained to make one latent frame (4 frames) at a time from the keys "
                "and values of the three before it. Frames leave while the rest of their chunk is computed; a stream's "
                "cost per frame does not grow. Its frames are a little worse than the teacher's."
            ),
            intended_use="Interactive sessions and streamed rollouts; one to four steps, no guidance.",
            training_data="Episodes of the pusher simulator, then its own rollouts.",
            license="Apache-2.0",
            links={},
            price_per_frame_usd=usd(MILS_PER_FRAME),
            spec=CatalogSpec(
                model_size="tiny",
                embodiment="pusher",
                action_dim=8,
                chunk_size=12,
                resolution=(64, 64),
                default_num_steps=1,
                default_guidance=0.0,
                runner="causal_student",
                encoder_name="PatchTokenizer",
                temporal_compression=4,
                base_model="tiny-pusher",
            ),
        ),
        _dreamdojo("dreamdojo-2b-gr1", "GR-1", "the Fourier GR-1", "slots 0-28", "2B_GR1_post-train"),
        _dreamdojo("dreamdojo-2b-g1", "G1", "the Unitree G1", "slots 58-100", "2B_G1_post-train"),
        _dreamdojo("dreamdojo-2b-agibot", "AgiBot", "the AgiBot G1", "slots 147-168", "2B_AgiBot_post-train"),
        _dreamdojo("dreamdojo-2b-yam", "YAM", "the bimanual YAM", "slots 101-146", "2B_YAM_post-train"),
    )
}


def model_spec(entry: CatalogEntry) -> ModelSpec:
    """What the request path needs of `entry`."""
    is_student = entry.spec.runner == "causal_student"
    return ModelSpec(
        slug=entry.slug,
        resolution=entry.spec.resolution,
        action_dim=entry.spec.action_dim,
        chunk_size=entry.spec.chunk_size,
        fps=FRAMES_PER_SECOND,
        default_num_steps=entry.spec.default_num_steps,
        default_guidance=entry.spec.default_guidance,
        mils_per_frame=MILS_PER_FRAME,
        max_num_steps=STUDENT_PASSES if is_student else MAX_NUM_STEPS,
        max_guidance=0.0 if is_student else MAX_GUIDANCE,
        piece_frames=(entry.spec.temporal_compression or 0) if is_student else 0,
    )
