"""Rewards: how good a student's final sample is, most of them against the teacher's."""

from .base import Reward, WeightedSum, evaluate, make_reward, register_reward
from .blind import CompressedSize, Label, Logit, LogProbability
from .discriminator import Discriminator
from .distributional import MMD, EnergyDistance
from .likelihood import TeacherLikelihood
from .maps import fit_map
from .online import OnlineReward, online_terms
from .pixel import MSE, PSNR, SSIM, Cosine
from .remote import Remote
from .scorers import Aesthetic, CLIPScore, Function, Onnx

__all__ = [
    "MMD",
    "MSE",
    "PSNR",
    "SSIM",
    "Aesthetic",
    "CLIPScore",
    "CompressedSize",
    "Cosine",
    "Discriminator",
    "EnergyDistance",
    "Function",
    "Label",
    "LogProbability",
    "Logit",
    "OnlineReward",
    "Onnx",
    "Remote",
    "Reward",
    "TeacherLikelihood",
    "WeightedSum",
    "evaluate",
    "fit_map",
    "make_reward",
    "online_terms",
    "register_reward",
]
