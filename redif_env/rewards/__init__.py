"""Rewards: how good a student's final sample is, most of them against the teacher's."""

from .base import Reward, WeightedSum, evaluate, make_reward, register_reward
from .blind import CompressedSize, Label
from .decoded import Decoded
from .maps import fit_map
from .pixel import MSE, PSNR, SSIM, Cosine

__all__ = [
    "MSE",
    "PSNR",
    "SSIM",
    "CompressedSize",
    "Cosine",
    "Decoded",
    "Label",
    "Reward",
    "WeightedSum",
    "evaluate",
    "fit_map",
    "make_reward",
    "register_reward",
]
