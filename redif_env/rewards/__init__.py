"""Rewards: how well a student's final sample agrees with the teacher's."""

from .base import Reward, WeightedSum, evaluate, make_reward, register_reward
from .pixel import MSE, PSNR, SSIM, Cosine

__all__ = [
    "MSE",
    "PSNR",
    "SSIM",
    "Cosine",
    "Reward",
    "WeightedSum",
    "evaluate",
    "make_reward",
    "register_reward",
]
