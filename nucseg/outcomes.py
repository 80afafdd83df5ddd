"""What tables compute and figures draw: the words and records that both know, so that neither imports the other."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

NOT_IN_PROFILE = "not run in this profile"
NOT_YET = "not run yet"
REFERENCE = "random-crop"  # the strategy that every other one is compared with


def signed(value: float, digits: int, none: str = "") -> str:
    """Return a number with its sign, the minus one of print; `none` where there is no number.

    >>> signed(-0.0214, 3)
    '−0.021'
    """
    return none if pd.isna(value) else f"{value:+.{digits}f}".replace("-", "−")


class BudgetCurve(NamedTuple):
    """Scores against what was annotated.

    Attributes
    ----------
    against
        ``"label_share"`` (part of the training pixels) or ``"label_nuclei"``.
    points
        One line per strategy and budget: selection, k1, ``x`` (mean over seeds), ``mean`` (over images, then seeds),
        ``low`` and ``high`` (worst and best seed), ``sd`` over seeds, ``seeds``.
    full
        Mean, worst and best seed of full supervision; NaN where it was not run.
    images
        Test images behind each mean.
    left_out
        Experiments without a place on the x axis, because their nuclei were not counted.
    """

    against: str
    points: pd.DataFrame
    full: tuple[float, float, float]
    images: int
    left_out: int
