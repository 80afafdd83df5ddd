"""Mean teacher: pseudo labels renewed at every step, our stronger variant of the pseudo-labelling of Sec. III-C.

Not the paper's. Two published ideas, per pixel:

- The teacher is the exponential moving average of the student's weights, and is what is returned at the end (Tarvainen
  and Valpola, "Mean teachers are better role models", NeurIPS 2017, which also gives the ramp of the weight).
- The teacher sees a weakly changed view (moved only) of a crop without labels, the student a strongly changed one
  (colour, blur, noise), and only where the teacher is sure does it teach (Sohn et al., "FixMatch", NeurIPS 2020). All
  other pixels are unknown: they add to no term of the loss.

The moves are shared by both views, so that targets are aligned pixel by pixel; HV targets are the teacher's own HV
output. Making nuclei of its maps first would need the watershed on the host at every step, and would sharpen its
mistakes; a regression to its output is what the mean teacher does.

Student and teacher start from the model of the round before, not from the initial weights as a round of fixed pseudo
labels does (REFERENCE A35): a teacher is asked from the first step on, and must know something by then. A35 is there
against fixed mistakes; these labels change with the teacher, and are masked where it doubts.

How much of a gain is the teacher's? A round with ``weight: 0`` is the same training, as long and as averaged, without
the unlabelled terms: report both. On real images over four seeds (profiles `sample-teacher`, `sample-teacher-silent`)
the teacher's word was worth 0.034 test AJI on Kumar (95 % interval over seeds 0.004 to 0.065) and 0.044 on TNBC (-0.006
to 0.094). Full supervision gains by the same treatment as well (profile `sample-recipes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nucseg.augment import AugmentConfig, augment
from nucseg.crops import CropPool
from nucseg.models.base import Segmenter
from nucseg.models.hover import HoverSegmenter


def _strong() -> AugmentConfig:
    return AugmentConfig(
        rot90=False, flip=False, colour_probability=1.0, stain=0.2, brightness=0.15, contrast=0.3, saturation=0.3,
        hue=12.0, blur_probability=0.5, blur_sigma=(0.3, 1.6), noise_probability=0.5, noise_sigma=(0.0, 0.06),
    )  # fmt: skip


@dataclass(frozen=True)
class MeanTeacherConfig:
    """Every number of the mean teacher.

    Attributes
    ----------
    decay
        Share of the teacher's weights that a step keeps.
    sure
        Probability from which the teacher's word on a pixel counts, nucleus or background. On the built-in tissue 0.8
        gave a higher validation AJI than 0.9 for both selections tried (one seed each), and than 0.95 for the one.
    weight
        Of the unlabelled terms beside the labelled ones.
    ramp
        Share of the training over which that weight rises, as exp(-5 (1 - t)^2).
    batch
        Unlabelled crops per step; 0 = as many as labelled ones.
    strong
        What the student's view goes through beyond the teacher's: colours, blur and noise. Moves are left out.
    """

    decay: float = 0.99
    sure: float = 0.8
    weight: float = 1.0
    ramp: float = 0.2
    batch: int = 0
    strong: AugmentConfig = field(default_factory=_strong)

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")
        if not 0.5 <= self.sure < 1:
            raise ValueError(f"sure must be in [0.5, 1), got {self.sure}")
        for name in ("weight", "batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {self.ramp}")


class MeanTeacher:
    """The unlabelled part of a training step, for `nucseg.training.train`; nothing leaves the device.

    Parameters
    ----------
    images
        (H, W, 3) uint8 each: the training images, annotated or not, never validation or test ones; as
        `Segmenter.prepare` returns them.
    config
        Every number.
    batch, crop
        Crops per step, and their side in pixels.
    moves
        The augmentation of the labelled crops, whose moves (rotation, flip, scale) both views share; None for none.
    device
        Where to train.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        config: MeanTeacherConfig,
        batch: int,
        crop: int,
        moves: AugmentConfig | None,
        device: torch.device | str,
    ):
        self.config, self.batch, self.crop = config, config.batch or batch, crop
        off = {"colour_probability": 0.0, "blur_probability": 0.0, "noise_probability": 0.0}
        self.weak = replace(moves, **off) if moves else None
        self.strong = replace(config.strong, rot90=False, flip=False, rotate=0.0, scale=(1.0, 1.0))
        blank = [(image, np.zeros(image.shape[:2], dtype=np.int32)) for image in images]
        self.pool = CropPool(blank, self.weak.window(crop) if self.weak else crop, torch.device(device))

    def __call__(
        self, student: Segmenter, teacher: Segmenter, generator: torch.Generator, share: Tensor
    ) -> dict[str, Tensor]:
        """Return the student's loss terms on what the teacher is sure of.

        Raises
        ------
        TypeError
            For a segmenter whose targets are not per pixel.
        """
        if not isinstance(teacher, HoverSegmenter):
            raise TypeError(
                f"a mean teacher teaches pixel by pixel, which {type(student).__name__} cannot learn from; "
                'use pseudo-labelling rounds with unsure: "ignore" for it'
            )
        images, labels = self.pool.draw(self.batch, generator)
        if self.weak:
            images, labels = augment(images, labels, self.weak, generator, self.crop)
        strong, _ = augment(images, labels, self.strong, generator)
        stem = next(p for p in student.parameters() if p.ndim == 4)
        last = stem.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        targets = teacher.teach(images.contiguous(memory_format=layout), self.config.sure)
        strong = strong.contiguous(memory_format=layout)
        risen = (share / max(self.config.ramp, 1e-9)).clamp(max=1)
        weight = self.config.weight * torch.exp(-5 * (1 - risen) ** 2)
        return {f"unlabelled_{name}": weight * value for name, value in student.loss_on(strong, targets).items()}
