"""Every number of a training (Sec. IV-A), and the learning rate of each of its iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingConfig:
    """Every number of a training.

    Attributes
    ----------
    iterations
        Optimiser steps, the same for every arm (A30).
    batch, crop
        Crops per step, and their side in pixels.
    optimiser
        ``"adamw"``, or ``"sgd"`` as the paper's Mask R-CNN (lr 0.005, momentum 0.9, weight decay 1e-4).
    lr, weight_decay, momentum
        Peak learning rate; decay of weights with two or more dimensions (not of biases and norms); SGD's momentum.
    schedule
        ``"constant"`` (the paper's, after the warm-up), ``"one-cycle"`` or ``"cosine-warmup"``.
    warmup
        Share of the iterations in which the rate rises.
    drops
        Shares of the iterations after each of which a constant rate falls to a tenth.
    clip
        Largest norm of the gradient, 0 = no limit.
    precision
        ``"fp32"`` or ``"bf16"`` (autocast, weights stay fp32).
    ema
        Decay of an exponential moving average of the weights, which is then what is validated and returned; 0 = none.
    channels_last
        Layout of images and weights in memory: what a GPU's tensor cores like best, except with grouped convolutions.
    cuda_graph
        Capture the step once and replay it, where that can be done: on a GPU, with a model of fixed shapes. Left aside
        elsewhere, so that one profile runs everywhere.
    benchmark
        Let cuDNN try a few algorithms for every convolution in the first steps, on a GPU. On an H100 that took 34 s
        (some have to be compiled) and gained `hoverlite` nothing.
    validate_every, log_every
        Iterations between validations (0 = only at the end) and between rows of the curve.
    """

    iterations: int = 5000
    batch: int = 6
    crop: int = 256
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: Literal["constant", "one-cycle", "cosine-warmup"] = "one-cycle"
    warmup: float = 0.1
    drops: tuple[float, ...] = ()
    clip: float = 5.0
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float = 0.0
    channels_last: bool = True
    cuda_graph: bool = False
    benchmark: bool = False
    validate_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.crop < 32:
            raise ValueError(f"crop must be at least 32, got {self.crop}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "clip", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("momentum", "ema", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.drops and (self.schedule != "constant" or not all(0 < share < 1 for share in self.drops)):
            raise ValueError(
                f"drops are shares in (0, 1) of a constant schedule, got {self.drops} and {self.schedule!r}"
            )


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Return the rate of an iteration, counted from 1.

    ``one-cycle`` rises from lr/25 to lr and falls to lr/25e4 along cosines, as `torch.optim.lr_scheduler.OneCycleLR`
    without its cycling momentum; ``cosine-warmup`` rises linearly and falls to 0; ``constant`` rises linearly and
    stays, but for its `drops`.
    """
    done = (iteration - 1) / max(config.iterations - 1, 1)
    rising = done < config.warmup
    share = done / config.warmup if rising else (done - config.warmup) / max(1 - config.warmup, 1e-9)
    if config.schedule == "one-cycle":
        low, high = (config.lr / 25, config.lr) if rising else (config.lr / 25e4, config.lr)
        return low + (high - low) * (1 - math.cos(math.pi * (share if rising else 1 - share))) / 2
    if rising:
        return config.lr * max(share, 1 / config.iterations)
    if config.schedule == "constant":
        return config.lr * 0.1 ** sum(done >= drop for drop in config.drops)
    return config.lr * (1 + math.cos(math.pi * share)) / 2
