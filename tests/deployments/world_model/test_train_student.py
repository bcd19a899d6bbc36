import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deployments.world_model import WorldModel, pusher, train_student
from deployments.world_model.causal import SIGMAS, CausalWorldModel
from deployments.world_model.train import Budget


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATCH", "ROUND_STEPS", "ROUND_EPISODES", "ROLLOUT_BATCH", "EVALUATION_EPISODES"):
        monkeypatch.setattr(train_student, name, 2)


def test_a_run_leaves_a_student_with_the_teachers_tensors_and_both_their_figures(
    small_model: WorldModel, tmp_path: Path
) -> None:
    train_student.train_student(small_model, tmp_path, Budget(3, None), seed=0, bf16=False)
    student = CausalWorldModel.load(tmp_path)
    assert student.config == small_model.config
    own, teachers = student.dit.state_dict(), small_model.dit.state_dict()
    assert own.keys() == teachers.keys()
    assert any(not torch.equal(own[name], teachers[name].half().float()) for name in own)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"teacher", *(f"student_{steps}_steps" for steps in (1, 2, len(SIGMAS)))} <= metrics.keys()
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "--steps 3 --seed 0" in card
    assert f"| {metrics['teacher']['psnr_db']:g} | {metrics['student_1_steps']['psnr_db']:g} |" in card


def test_an_episode_that_the_simulator_leads_has_its_own_frames_before_each(small_model: WorldModel) -> None:
    student = CausalWorldModel(small_model)
    pool = train_student.roll_out(student, np.random.default_rng(0), 2, own_share=0.0)
    assert pool.before_ECTHW.shape == (2, small_model.config.dit.latent_channels, 13, 8, 8)
    assert pool.actions_ETA.shape == (2, 13, small_model.config.grouped_action_dim)
    assert torch.equal(pool.before_ECTHW, pool.target_ECTHW)
    assert not pool.actions_ETA[:, 0].any()


def test_an_episode_that_the_student_leads_has_the_students_latents_before_each(small_model: WorldModel) -> None:
    student = CausalWorldModel(small_model)
    pool = train_student.roll_out(student, np.random.default_rng(0), 2, own_share=1.0)
    random = np.random.default_rng(0)
    frames = list(pusher.render(pusher.reset(2, random)))
    assert torch.equal(pool.before_ECTHW[:, :, 0], student.begin(frames, [0, 0]).latents_BCHW)
    assert not torch.allclose(pool.before_ECTHW[:, :, 1:], pool.target_ECTHW[:, :, 1:], atol=0.1)
