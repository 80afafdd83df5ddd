"""Everything that one profile's ``results.csv`` shows about one dataset: tables and figures, without the images.

`nucseg tables` writes it, notebook 05 shows it. Nothing is trained, and no dataset need be at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from nucseg.data.tissue import SYNTHETIC_NOTE
from nucseg.experiments import GridSettings
from nucseg.figures import comparison, style
from nucseg.outcomes import NOT_IN_PROFILE
from nucseg.paper import BEYOND, TABLES
from nucseg.plans import BUDGET, TABLE, experiments
from nucseg.profiles import Profile
from nucseg.results import EXPERIMENT, read_results, read_runs
from nucseg.results.settings import training_images
from nucseg.store import published
from nucseg.tables import Table, make_tables, strategies, write_table
from nucseg.tables.forest import forest_frame
from nucseg.tables.showcase import showcase
from nucseg.tables.side_by_side import table_4_of_all

COLOURS = 128  # of a figure with pictures of tissue: a third of the bytes, and nobody sees it


@dataclass(frozen=True)
class Report:
    """What there is to show.

    Attributes
    ----------
    profile, dataset
        Names.
    results, runs
        The profile's lines of this dataset, and those runs' lines of ``runs.csv``.
    progress
        One line per table: how many experiments it has, and how many of them have results.
    tables
        ``"I"`` to ``"VI"``; ``"IV of all"``, ``"S"`` and ``"B"`` where there is something in them.
    figures
        ``"forest"`` with a difference to show; ``"budget"`` with two budgets or more; ``"ranks"`` with enough of
        strategies and images; ``"figure7"`` with pictures that came from another machine (`nucseg.results.examples`),
        elsewhere notebook 04 draws it.
    signature
        The line under every figure.
    """

    profile: str
    dataset: str
    results: pd.DataFrame
    runs: pd.DataFrame
    progress: pd.DataFrame
    tables: dict[str, Table]
    figures: dict[str, Figure]
    signature: str

    def write(self) -> tuple[Path, ...]:
        """Write tables to ``tables/<profile>/`` and figures to ``figures/<profile>/``; return the paths.

        A table of which the profile runs no row, and of which none has a result, is not written.
        """
        folder = published("tables", self.profile)
        meant = [table for table in self.tables.values() if (table.frame["status"] != NOT_IN_PROFILE).any()]
        paths = [path for table in meant for path in write_table(table, folder)]
        run_ids = sorted(set(self.results["run_id"]))
        for name, figure in self.figures.items():
            path = published("figures", self.profile) / f"{name}_{self.dataset}.png"
            colours = COLOURS if name == "figure7" else 0
            paths.append(style.save(figure, path, self.signature, run_ids, colours=colours))
        return tuple(paths)


def make_report(profile: Profile, dataset: str = "", folder: str | Path | None = None) -> Report:
    """Make all tables and figures of a profile on a dataset from its results.

    Parameters
    ----------
    profile
        Only its name and grid are used.
    dataset
        Its name or folder; the profile's own when empty.
    folder
        Where ``results.csv`` and ``runs.csv`` are; ``tables/<profile>`` when None.

    Raises
    ------
    FileNotFoundError
        If there are no results of this profile on this dataset; the message says what makes some.
    ResultsError
        If the results do not fit together.
    """
    name, settings = Path(dataset or profile.dataset).name, profile.grid
    folder = published("tables", profile.name) if folder is None else Path(folder)
    path = folder / "results.csv"
    every = read_results(path) if path.is_file() else None
    if every is not None:
        every = every[every["profile"] == profile.name]
    if every is None or name not in set(every["dataset"]):
        have = "" if every is None or every.empty else f" (only on {', '.join(sorted(set(every['dataset'])))})"
        raise FileNotFoundError(
            f"no results of profile {profile.name!r} on {name!r} in {path}{have}; notebook 04 makes some, "
            f"and so does: nucseg run --profile {profile.name} --dataset {dataset or name}"
        )
    results = every[every["dataset"] == name]
    runs = read_runs(folder / "runs.csv") if (folder / "runs.csv").is_file() else None
    mine = None if runs is None else runs[runs["run_id"].isin(set(results["run_id"]))]
    images = None if mine is None else training_images(mine, name)
    tables = {table.number: table for table in make_tables(results, name, settings, runs=runs)}
    extra = {
        "IV of all": table_4_of_all(every, settings, runs),
        TABLE: strategies.strategy_table(results, name, settings),
        BUDGET: strategies.budget_table(results, name, settings, images),
    }
    curves = [strategies.budget_curve(results, name, settings, against) for against in ("label_share", "label_nuclei")]
    ranks = strategies.strategy_ranks(results, name, settings)
    forest = forest_frame(results, name, settings, runs)
    figures = {
        "forest": comparison.forest_plot(forest) if forest["mean difference"].notna().any() else None,
        "budget": comparison.budget_curves(curves),
        "ranks": comparison.rank_plot(ranks) if ranks else None,
        "figure7": showcase(results, name, settings, runs),
    }
    return Report(
        profile.name,
        name,
        results,
        pd.DataFrame() if mine is None else mine,
        _progress(results, name, settings, images),
        tables | {key: table for key, table in extra.items() if table is not None},
        {key: figure for key, figure in figures.items() if figure is not None},
        _signature(results, profile.name, name),
    )


def _progress(results: pd.DataFrame, dataset: str, settings: GridSettings, images: int | None) -> pd.DataFrame:
    done = set(results[list(EXPERIMENT)].itertuples(index=False, name=None))
    lines = []
    for table in (*TABLES, *BEYOND):
        planned = experiments([table], dataset, settings, images)
        found = [e for e in planned if tuple(getattr(e, name) for name in EXPERIMENT) in done]
        lines.append({"table": table, "experiments": len(planned), "with results": len(found)})
    return pd.DataFrame(lines).set_index("table")


def _signature(results: pd.DataFrame, profile: str, dataset: str) -> str:
    """Return the line that `nucseg.pipeline.Pipeline.signature` gives, without the dataset."""
    parts = [f"profile {profile}", f"dataset {dataset} {results['fingerprint'].iloc[0][:8]}"]
    return "  ·  ".join(parts + [SYNTHETIC_NOTE] * (dataset == "tissue"))
