"""Rewards: how good a student's final sample is, most of them against the teacher's."""

from .base import (
    MapReward,
    Reward,
    Score,
    WeightedSum,
    evaluate,
    evaluate_terms,
    make_reward,
    register_reward,
)
from .blind import CompressedSize, Label
from .checker import check_reward
from .features import Features
from .images import ImageInput
from .maps import fit_map
from .perceptual import LPIPS
from .pixel import MSE, PSNR, SSIM, Cosine, HistogramKL, MultiScaleSSIM
from .pretrained import CLIPCosine, DINOPatches, PerceptionEncoderCosine

__all__ = [
    "LPIPS",
    "MSE",
    "PSNR",
    "SSIM",
    "CLIPCosine",
    "CompressedSize",
    "Cosine",
    "DINOPatches",
    "Features",
    "HistogramKL",
    "ImageInput",
    "Label",
    "MapReward",
    "MultiScaleSSIM",
    "PerceptionEncoderCosine",
    "Reward",
    "Score",
    "WeightedSum",
    "check_reward",
    "evaluate",
    "evaluate_terms",
    "fit_map",
    "make_reward",
    "register_reward",
]
