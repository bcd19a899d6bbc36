import json
from dataclasses import replace

import pytest

from deployments.world_model import PRESETS, WorldModelConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]
    assert WorldModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_unknown_field_is_refused_by_name() -> None:
    data = PRESETS["tiny-pusher"].to_json()
    data["dit"]["depth"] = 3
    with pytest.raises(ValueError, match="DiTConfig has no field 'depth'"):
        WorldModelConfig.from_json(data)


def test_a_missing_field_is_refused_by_name() -> None:
    data = PRESETS["tiny-pusher"].to_json()
    del data["sampler"]["shift"]
    with pytest.raises(ValueError, match="SamplerConfig lacks the field 'shift'"):
        WorldModelConfig.from_json(data)


def test_dreamdojo_chunks_have_the_published_latent_shape() -> None:
    config = PRESETS["dreamdojo-2b"]
    assert config.latent_shape == (16, 4, 60, 80)
    assert config.grouped_action_dim == 1536
    assert config.dit.head_dim == 128


def test_a_chunk_must_hold_whole_latent_frames() -> None:
    with pytest.raises(ValueError, match="chunk_size 10"):
        replace(PRESETS["tiny-pusher"], chunk_size=10)
