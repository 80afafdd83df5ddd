"""Losses that are no longer finite: found, named by patch, scale and step, and never passed over in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


class DivergenceError(RuntimeError):
    """A training's losses are no longer finite, or have left every plausible range."""


class DivergenceWarning(RuntimeWarning):
    """One of several trainings diverged; the others went on."""


@dataclass(frozen=True)
class Divergence:
    """Where one of k1 trainings diverged, and what became of it.

    Attributes
    ----------
    patch, scale, step
        Which training, counted from 0.
    term
        The loss term, or ``"weights"`` where only a weight was not finite after the last step.
    value
        What it was.
    outcome
        ``"restarted"``: trained once more from the scale's start with a lower learning rate. ``"skipped"``: it diverged
        again, and this scale only enlarges the image of the one before. ``"left out"``: it diverged again at the
        coarsest scale, so that there is no image to enlarge: the patch has no synthetic images.
    """

    patch: int
    scale: int
    step: int
    term: str
    value: float
    outcome: str

    OUTCOMES = ("restarted", "skipped", "left out")

    def __str__(self) -> str:
        return f"patch {self.patch}, scale {self.scale}, step {self.step}: {self.term} is {self.value:g}; " + {
            "restarted": "this scale is trained again for this patch, at a lower learning rate",
            "skipped": "diverged again; for this patch this scale only enlarges the image of the scale before",
            "left out": "diverged again at the coarsest scale; this patch gets no synthetic images",
        }.get(self.outcome, self.outcome)


def first_divergences(
    losses: Float[Tensor, "steps networks terms"], limit: float, first_step: int = 0
) -> dict[int, tuple[int, int, float]]:
    """Return step, term and value of each network's first loss that is not finite or beyond `limit`, by network.

    One transfer from the device, so call it once for many steps.
    """
    losses = losses.detach().cpu()
    bad = ~(losses.abs() <= limit)  # NaN compares as False
    found: dict[int, tuple[int, int, float]] = {}
    for step, network, term in bad.nonzero().tolist():
        found.setdefault(network, (first_step + step, term, losses[step, network, term].item()))
    return found


def check_losses(
    losses: Float[Tensor, "steps networks terms"], limit: float, who: str, first_step: int, terms: Sequence[str]
) -> None:
    """Raise `DivergenceError` if any of `losses` is not finite or beyond `limit`."""
    for network, (step, term, value) in first_divergences(losses, limit, first_step).items():
        raise DivergenceError(
            f"{who}: network {network}, step {step}: {terms[term]} is {value:g} (limit {limit:g}); "
            "lower the learning rate, or try another seed"
        )
