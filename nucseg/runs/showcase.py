"""What Figure 7 shows of a profile's own runs; from received results, `nucseg.tables.showcase` draws it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nucseg import metrics
from nucseg.experiments import Experiment, experiments_of
from nucseg.figures.segmentation import Row
from nucseg.paper import FIGURE_7, row
from nucseg.pipeline import Pipeline


def systems(pipeline: Pipeline, experiments: Sequence[Experiment]) -> dict[str, Experiment | None]:
    """Return the columns of Fig. 7 with their experiments, None for those that are not among `experiments`.

    A column whose segmenter the profile replaces says so. Of several seeds the first is shown.
    """
    settings, dataset = pipeline.profile.grid, pipeline.dataset.name
    columns: dict[str, Experiment | None] = {}
    for name, row_id in FIGURE_7.items():
        shown = row(row_id)
        experiment = experiments_of(shown, dataset, settings)[0]
        replaced = experiment.segmenter != shown.spec.segmenter
        title = f"{name}\n[{experiment.segmenter}]" if replaced else name
        columns[title] = experiment if experiment in experiments else None
    return columns


def worst_and_best(
    pipeline: Pipeline, columns: dict[str, Experiment | None], size: int = 256
) -> tuple[list[Row], dict[str, list[float]]]:
    """Return a crop of the worst and of the best test image, and each system's AJI on the whole of both.

    Parameters
    ----------
    columns
        As from `systems`; those without an experiment are left out.
    size
        Side of the crop in pixels, from the middle of the image; of a smaller image all of it.

    Worst and best are by the mean AJI of all runs that are shown; one that fills two columns counts once.
    """
    test = pipeline.dataset.test
    shown = {name: e for name, e in columns.items() if e is not None}
    predicted = {name: pipeline.predictions(e, e.rounds) for name, e in shown.items()}
    aji = {name: [metrics.aji(s.labels, maps[s.id]) for s in test] for name, maps in predicted.items()}
    mean = np.mean(list({e: aji[name] for name, e in shown.items()}.values()), axis=0)
    rows, scores = [], {name: [] for name in aji}
    for title, index in (("worst", int(mean.argmin())), ("best", int(mean.argmax()))):
        sample = test[index]
        side = [min(size, length) for length in sample.shape]
        cut = tuple(slice((h - s) // 2, (h - s) // 2 + s) for h, s in zip(sample.shape, side, strict=True))
        maps = {name: maps[sample.id][cut] for name, maps in predicted.items()}
        rows.append(Row(sample.image[cut], sample.labels[cut], maps, f"{title}: {sample.organ}\n{sample.id[:20]}"))
        for name, values in aji.items():
            scores[name].append(values[index])
    return rows, scores
