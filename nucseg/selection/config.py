"""Every number of the selection stage, with the paper's value or REFERENCE's resolution as default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The release clusters with random_state 42 (coarse) and 500 (fine): seed 42 must mean exactly that pair (REFERENCE A8).
FINE_SEED_OFFSET = 500 - 42


@dataclass(frozen=True)
class SelectionConfig:
    """Settings of Sec. III-A and of the strategies that it is compared with.

    Attributes
    ----------
    size, step
        Side s of a patch and sliding step t, pixels; `size` is even, sub-regions are size/2 (fed natively, A7).
    cover_border
        Add a last position flush with the right and lower border; off as printed (A12).
    tissue
        Least share of a patch that shows tissue and not glass or fat (`content.GLASS`); others are left out of the
        pool. 0 keeps all, as in the paper, whose images are cut from tissue; slides are mostly glass. The centre crops
        of ``random-centre-crop`` are not from the pool.
    nuclei
        Share of the pool that is left out because it holds least nuclear content (`pool.nuclear_content`, by colour
        alone), whatever the strategy. 0 keeps all, as in the paper. The centre crops of ``random-centre-crop`` are not
        from the pool.
    normalise
        Mean and standard deviation of the encoder's own training before it; the released code feeds plain [0, 1] (A6).
    batch
        Patches per forward pass on a GPU (four times as many sub-regions); `cpu_batch` is the same on a CPU, small
        enough for its caches.
    precision
        Of the forward passes on a GPU; distances are float32 either way. float16 is as fast as bfloat16 and keeps three
        more bits: on Kumar (EfficientNet-Lite2, step 15, four seeds) 35 of 36 picks were those of float32, with
        bfloat16 18. A feature that overflows float16 is an error in `cps`, never a silent pick.
    init, n_init, coarse_max_iter, fine_max_iter, tol
        k-means as scikit-learn names them; the release's values, and scikit-learn's `tol` (A8).
    coarse_seed, fine_seed
        Fix the seed of a level; None takes the call's `seed`, and `seed` + 458 for the fine level: seed 42 is the
        release's pair 42 and 500.
    candidates
        ``"all"`` patches of a coarse cluster (Algorithm 1), or ``"with-largest"``: only those with a sub-region in the
        largest fine cluster (the released code; A9).
    exclusion
        Largest IoU that a pick may have with an earlier one of the same image; None allows overlaps (A11).
    typicality_neighbours
        K of TypiClust.
    graph_patches, ball_purity
        ProbCover: patches of the pool (drawn at random) that its graph is built on, and the share of balls that must be
        pure.
    content_floor
        ``cps-standardised``: quantile of nuclear content, inside each coarse cluster, below which a patch is no
        candidate.
    standard_exclusion
        ``cps-standardised``: the value of `exclusion` where that is None.
    """

    size: int = 256
    step: int = 15
    cover_border: bool = False
    tissue: float = 0.0
    nuclei: float = 0.0
    normalise: bool = True
    batch: int = 512
    cpu_batch: int = 4
    precision: Literal["bfloat16", "float16", "float32"] = "float16"
    init: Literal["random", "k-means++"] = "random"
    n_init: int = 10
    coarse_max_iter: int = 10_000
    fine_max_iter: int = 50_000
    tol: float = 1e-4
    coarse_seed: int | None = None
    fine_seed: int | None = None
    candidates: Literal["all", "with-largest"] = "all"
    exclusion: float | None = None
    typicality_neighbours: int = 20
    graph_patches: int = 4000
    ball_purity: float = 0.95
    content_floor: float = 0.5
    standard_exclusion: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "size", "step", "batch", "cpu_batch", "n_init", "coarse_max_iter", "fine_max_iter",
            "typicality_neighbours", "graph_patches",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size % 2:
            raise ValueError(f"size must be even to be cut 2 x 2, got {self.size}")
        if self.tol < 0:
            raise ValueError(f"tol must be >= 0, got {self.tol}")
        if not 0 <= self.nuclei < 1:
            raise ValueError(f"nuclei must lie in 0..1 (1 excluded), got {self.nuclei}")
        for name in ("tissue", "exclusion", "ball_purity", "content_floor", "standard_exclusion"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {value}")
        for name in ("coarse_seed", "fine_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")

    def seeds(self, seed: int) -> tuple[int, int]:
        """Return the seeds of the coarse and of the fine k-means for a call's `seed`."""
        coarse = seed if self.coarse_seed is None else self.coarse_seed
        fine = seed + FINE_SEED_OFFSET if self.fine_seed is None else self.fine_seed
        return coarse, fine
