"""One experiment: the frozen record from which every result follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """Everything that tells two results apart, beside the profile.

    Attributes
    ----------
    dataset
        ``"tissue"``, ``"kumar"``, ``"tnbc"``, ``"monuseg"``.
    selection
        A strategy of `nucseg.selection.select`, or ``"all"`` for full supervision.
    k1, k2
        Patches to annotate, and fine clusters per coarse cluster (Sec. III-A); 0 for full supervision.
    augmentation
        ``"none"``, ``"naive"``, or the synthesiser whose pairs are added to the naive augmentation: ``"csingan"``,
        ``"csingan-no-cwd"``, ``"singan"``, ``"pix2pix"``, ``"cyclegan"``.
    segmenter
        A name of `nucseg.models.build`.
    rounds
        Pseudo-labelling rounds, 0 for none.
    seed
        Seeds the random baselines' selection and everything after it.
    """

    dataset: str
    selection: str
    k1: int
    k2: int
    augmentation: str
    segmenter: str
    rounds: int
    seed: int

    @property
    def supervision(self) -> str:
        """``"full"`` or ``"patches"``."""
        return "full" if self.selection == "all" else "patches"
