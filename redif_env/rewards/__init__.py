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
from .blind import CompressedSize, Label, Logit, LogProbability
from .checker import check_reward
from .decoded import Decoded
from .discriminator import Discriminator
from .distributional import MMD, EnergyDistance
from .features import Features
from .images import ImageInput
from .likelihood import TeacherLikelihood
from .maps import fit_map
from .online import OnlineReward, online_terms
from .perceptual import LPIPS
from .pixel import MSE, PSNR, SSIM, Cosine, HistogramKL, MultiScaleSSIM
from .pretrained import CLIPCosine, DINOPatches, PerceptionEncoderCosine
from .remote import Remote
from .scorers import Aesthetic, CLIPScore, Function, Onnx

__all__ = [
    "LPIPS",
    "MMD",
    "MSE",
    "PSNR",
    "SSIM",
    "Aesthetic",
    "CLIPCosine",
    "CLIPScore",
    "CompressedSize",
    "Cosine",
    "DINOPatches",
    "Decoded",
    "Discriminator",
    "EnergyDistance",
    "Features",
    "Function",
    "HistogramKL",
    "ImageInput",
    "Label",
    "LogProbability",
    "Logit",
    "MapReward",
    "MultiScaleSSIM",
    "OnlineReward",
    "Onnx",
    "PerceptionEncoderCosine",
    "Remote",
    "Reward",
    "Score",
    "TeacherLikelihood",
    "WeightedSum",
    "check_reward",
    "evaluate",
    "evaluate_terms",
    "fit_map",
    "make_reward",
    "online_terms",
    "register_reward",
]
