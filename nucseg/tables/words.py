"""What an arm is called where there is no row of the paper to name it."""

from __future__ import annotations

WORDS = {
    "cps": "CPS",
    "kmeans": "K-means",
    "random-crop": "RndCrop",
    "random-centre-crop": "RndCenCrop",
    "all": "all labels",
    "none": "no augmentation",
    "naive": "NaiveAug",
    "csingan": "CSinGAN",
    "singan": "SinGAN",
    "cyclegan": "CycleGAN",
}


def arm_in_words(selection: str, augmentation: str, rounds: int, teacher: str = "") -> str:
    """Return what a segmenter saw: which patches, what was done to them, and what followed."""
    parts = [WORDS.get(name, name) for name in (selection, augmentation)]
    parts += [teacher or f"{rounds} round{'s' * (rounds > 1)}"] * bool(rounds)
    return " + ".join(parts)
