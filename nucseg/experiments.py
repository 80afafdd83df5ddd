"""One experiment, the frozen record from which every result follows, and the experiments of a profile's rows.

Both random baselines run over the seeds 21, 100, 500, 1000 (A41). Full supervision is the selection ``"all"``. An
experiment that several tables show is one experiment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nucseg.config import check_name
from nucseg.paper import TABLES, Row, rows

RANDOM_STRATEGIES = (
    "random-crop",
    "random-centre-crop",
)  # look at no image, and have seeds of their own


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


@dataclass(frozen=True)
class GridSettings:
    """Which rows a profile runs, how large, and over which seeds.

    Attributes
    ----------
    k1
        K1 by dataset; the paper's are Kumar 9, TNBC 6, MoNuSeg 18 (3.9 % of its pixels, A4).
    k2
        Fine clusters per coarse cluster, 4 in the paper.
    rounds
        Pseudo-labelling rounds of the "+ Plabel" and "Ours" rows (A34).
    seeds
        Seeds of every row but the random baselines.
    random_seeds
        Seeds of RndCrop and RndCenCrop (A41).
    substitutes
        Lighter segmenters by the name that they stand in for, for example ``{"maskrcnn": "hoverlite"}``. The tables
        name them in the row.
    keep
        Ids of rows that keep their own segmenter all the same, for example ``("I.cps",)``.
    rows
        Keys of the rows to run by table; ``("*",)`` for all. They run in this order; a table left out does not.
    k1_grid
        Table VI's three values of K1 as parts of the dataset's own: 6/9, 9/9 and 12/9 in the paper.
    strategies
        Selection strategies of Table S (not in the paper), ``("*",)`` for all. Random crops are always among them, to
        compare with.
    budget_grid
        Budgets of the label-budget curve (Table B, not in the paper), as parts of the dataset's K1.
    budget_strategies
        Those of the curve, likewise.
    strategy_rounds
        Rounds of pseudo labels, or of the mean teacher, that every strategy of Tables S and B goes through.
    full_rounds
        Rounds of full supervision in Table B: with the mean teacher alone, fixed pseudo labels would add nothing to it.
    """

    k1: dict[str, int] = field(default_factory=lambda: {"kumar": 9, "tnbc": 6, "monuseg": 18})
    k2: int = 4
    rounds: int = 3
    seeds: tuple[int, ...] = (1, 2, 3)
    random_seeds: tuple[int, ...] = (21, 100, 500, 1000)
    substitutes: dict[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    rows: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(TABLES, ("*",)))
    k1_grid: tuple[float, ...] = (6 / 9, 1.0, 12 / 9)
    strategies: tuple[str, ...] = ("*",)
    budget_grid: tuple[float, ...] = (1 / 3, 2 / 3, 1.0, 4 / 3, 2.0)
    budget_strategies: tuple[str, ...] = ("*",)
    strategy_rounds: int = 0
    full_rounds: int = 0

    def __post_init__(self):
        for dataset, k1 in self.k1.items():
            if k1 < 1:
                raise ValueError(f"k1: expected at least 1 patch for {dataset}, got {k1}")
        for name, lowest in (("k2", 1), ("rounds", 0), ("strategy_rounds", 0), ("full_rounds", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, got {getattr(self, name)}")
        for name in ("seeds", "random_seeds"):
            seeds = getattr(self, name)
            if not seeds or len(set(seeds)) < len(seeds):
                raise ValueError(f"{name}: expected at least one seed and none twice, got {seeds}")
            if min(seeds) < 0:
                raise ValueError(f"{name}: expected seeds of at least 0, got {seeds}")
        if self.substitutes:
            from nucseg.models import REGISTRY  # loads torch, which a reader of results does without

            for name in (*self.substitutes, *self.substitutes.values()):
                check_name("substitutes", name, REGISTRY)
        for table, keys in self.rows.items():
            known = [row.key for row in rows(table)]
            for key in keys:
                if key != "*":
                    check_name(f"rows: Table {table}", key, known)
        for name in self.keep:
            check_name("keep", name, [row.id for table in TABLES for row in rows(table)])
        if len(self.k1_grid) != 3 or min(self.k1_grid) <= 0 or self.k1_grid[1] != 1:
            raise ValueError(f"k1_grid: expected three positive parts of K1, the middle one 1, got {self.k1_grid}")
        if not self.budget_grid or min(self.budget_grid) <= 0:
            raise ValueError(f"budget_grid: expected positive parts of K1, got {self.budget_grid}")

    def runs(self, row: Row) -> bool:
        """Say whether this profile runs a row."""
        keys = self.rows.get(row.table, ())
        return "*" in keys or row.key in keys

    def chosen(self, table: str) -> list[Row]:
        """Return the rows of a table that this profile runs, in the order in which it names them."""
        keys = self.rows.get(table, ())
        return sorted(filter(self.runs, rows(table)), key=lambda row: keys.index(row.key if row.key in keys else "*"))

    def segmenter(self, row: Row) -> str:
        """Return the segmenter that a row is run with: its own, or the substitute."""
        own = row.spec.segmenter
        return own if row.id in self.keep else self.substitutes.get(own, own)


def experiments_of(row: Row, dataset: str, settings: GridSettings) -> tuple[Experiment, ...]:
    """Return a row's experiments on a dataset, one per seed, whether or not the profile runs the row.

    Raises
    ------
    ValueError
        If `settings.k1` does not know the dataset.
    """
    spec = row.spec
    if spec.selection == "all":
        k1 = k2 = 0
    else:
        if dataset not in settings.k1:
            raise ValueError(
                f"k1: no K1 for dataset {dataset!r}, only for {', '.join(sorted(settings.k1))}; "
                f"add `grid: {{k1: {{{dataset}: 9}}}}` to the profile"
            )
        k1 = max(1, int(settings.k1[dataset] * settings.k1_grid[spec.k1_step] + 0.5))
        k2 = settings.k2 if spec.k2 is None else spec.k2
    rounds = settings.rounds if spec.plabel else 0
    seeds = settings.random_seeds if spec.selection in RANDOM_STRATEGIES else settings.seeds
    segmenter = settings.segmenter(row)
    return tuple(
        Experiment(dataset, spec.selection, k1, k2, spec.augmentation, segmenter, rounds, seed) for seed in seeds
    )


def grid(dataset: str, settings: GridSettings, tables: Iterable[str] | None = None) -> tuple[Experiment, ...]:
    """Return the distinct experiments that a profile runs on a dataset, in the order of tables and of its `rows`."""
    distinct: dict[Experiment, None] = {}
    for table in TABLES if tables is None else tables:
        for row in settings.chosen(table):
            distinct.update(dict.fromkeys(experiments_of(row, dataset, settings)))
    return tuple(distinct)
