"""Figure 7 from a profile's own runs: which columns, and which images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from nucseg.runs.plan import Plan
from nucseg.runs.showcase import systems, worst_and_best


def test_the_columns_are_the_runs_that_there_are_whatever_row_asked_for_them():
    plan = Plan("sample", device="cpu")
    columns = systems(plan.pipeline, plan.experiments)
    shown = {name: e for name, e in columns.items() if e is not None}
    assert shown["MRCNN\n[hoverlite]"] == shown["HoVer-Net\n[hoverlite]"]  # one run: both have hoverlite in their place
    assert shown["MRCNN + Ours"].segmenter == "maskrcnn"
    assert columns["pix2pix + MRCNN\n[hoverlite]"] is None


def test_worst_and_best_are_by_the_mean_of_the_runs_and_a_run_in_two_columns_counts_once():
    square = np.zeros((40, 50), np.int32)
    square[10:20, 10:30] = 1
    part, none = np.where(np.arange(50) < 14, square, 0), np.zeros_like(square)
    samples = [
        SimpleNamespace(id=name, organ="colon", shape=square.shape, image=np.full((40, 50, 3), i), labels=square)
        for i, name in enumerate("abc")
    ]
    # By the mean of both runs "a" is the worst (0.5 and 0.6); if b, which fills two columns, counted twice, "b" were.
    found = {
        "a": {"a": none, "b": square, "c": square},
        "b": {"a": square, "b": part, "c": square},
    }
    pipeline = SimpleNamespace(dataset=SimpleNamespace(test=samples), predictions=lambda e, after: found[e.name])
    a, b = (Run(name) for name in "ab")
    rows, scores = worst_and_best(pipeline, {"A": a, "B": b, "B too": b, "not run": None}, size=16)
    assert [row.title.split("\n")[1] for row in rows] == ["a", "c"]
    assert rows[0].image.shape == (16, 16, 3)
    assert np.array_equal(rows[1].labels, square[12:28, 17:33])
    assert scores == {"A": [0.0, 1.0], "B": [1.0, 1.0], "B too": [1.0, 1.0]}
    (whole, _), _ = worst_and_best(pipeline, {"A": a}, size=45)
    assert whole.image.shape == (40, 45, 3)


class Run:
    """An experiment, as far as a showcase looks at it."""

    rounds = 0

    def __init__(self, name: str):
        self.name = name
