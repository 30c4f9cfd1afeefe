"""The benchmark of rewards without a gradient, from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import blind_rewards
from examples.image_data import load_images
from redif_env.errors import InvalidArgumentError


def test_it_resumes_and_shows_a_run_beside_its_control(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(blind_rewards, "load_teacher", lambda: teacher)
    args = blind_rewards.Args(
        terms=("label",),
        seeds=(0,),
        iterations=2,
        num_envs=256,
        bank_size=32,
        num_held_out=100,
        every=1,
        out=tmp_path / "results.json",
    )
    rows = blind_rewards.main(args)
    weight = blind_rewards.SETTINGS["label"].weight
    names = [(row["reward"], row["weight"]) for row in rows]
    assert names == [(f"1*mse+{weight:g}*label", weight), ("mse", 0)]
    with_blind, control = (row["curve"] for row in rows)
    assert [point["iteration"] for point in control] == [0, 1, 2]
    assert with_blind[0] == control[0]
    assert with_blind[-1] != control[-1]
    assert rows[0]["teacher"]["mse"] == 0
    assert args.out.with_suffix(".png").stat().st_size > 10_000
    written = args.out.stat().st_mtime_ns
    assert blind_rewards.main(args) == rows == json.loads(args.out.read_text())
    assert args.out.stat().st_mtime_ns == written


def test_the_classifier_is_seeded_and_leaves_the_global_generator_alone():
    digits = load_images("digits")
    before = torch.get_rng_state()
    first, again, other = (blind_rewards.make_classifier(digits, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    logits = [net(digits.held_out_images) for net in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    # A hundred labels are worth 92 %; guessing 10 %.
    assert float((logits[0].argmax(1) == digits.held_out_classes).float().mean()) > 0.85


def test_unknown_terms_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InvalidArgumentError, match="terms='beauty'"):
        blind_rewards.main(blind_rewards.Args(terms=("beauty",), out=tmp_path / "out" / "r.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ppo_raises_the_size_reward_and_the_error_does_not_suffer(tmp_path):
    """In 10 iterations bytes fall by 3; the control's, which comes nearer the teacher's, by 1."""
    args = blind_rewards.Args(
        terms=("size",),
        seeds=(0,),
        iterations=10,
        bank_size=1024,
        num_held_out=100,
        out=tmp_path / "results.json",
    )
    with_blind, control = (row["curve"] for row in blind_rewards.main(args))
    assert with_blind[-1]["blind"] > with_blind[0]["blind"] + 1.5
    assert with_blind[-1]["blind"] > control[-1]["blind"] + 0.75
    assert with_blind[-1]["mse"] < with_blind[0]["mse"]
