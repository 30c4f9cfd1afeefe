"""Rewards: how well a student's final sample agrees with the teacher's."""

from .base import Reward, WeightedSum, evaluate, make_reward, register_reward
from .maps import fit_map
from .pixel import MSE, PSNR, SSIM, Cosine

__all__ = [
    "MSE",
    "PSNR",
    "SSIM",
    "Cosine",
    "Reward",
    "WeightedSum",
    "evaluate",
    "fit_map",
    "make_reward",
    "register_reward",
]
