import json

import pytest

from nucseg import progress
from nucseg.progress import task


def test_inner_tasks_move_the_outer_one_on(monkeypatch):
    with task("experiments", 4) as outer:
        outer.update(1)
        assert progress.fraction() == pytest.approx(0.25)
        with task("training", 10) as inner:
            inner.update(5, "loss 1.20")
            assert progress.fraction() == pytest.approx((1 + 0.5) / 4)
            assert progress.describe() == "experiments · training · loss 1.20"
        outer.update(2)
        assert progress.fraction() == pytest.approx(0.5)
    assert progress.fraction() == 0.0


def test_stages_report_done_of_total_whatever_their_unit():
    with task("features") as features:
        features(30, 120, "patches")
        assert progress.fraction() == pytest.approx(0.25)


def test_a_task_that_fails_is_closed():
    with pytest.raises(ValueError, match="bad"), task("training", 10):
        raise ValueError("bad")
    assert progress.describe() == ""


def test_a_kernel_reports_to_the_file_that_its_parent_watches(tmp_path, monkeypatch):
    path = tmp_path / "progress"
    monkeypatch.setenv("NUCSEG_PROGRESS", str(path))
    monkeypatch.setattr(progress, "_last", 0.0)
    with task("experiments", 2) as outer:
        monkeypatch.setattr(progress, "_last", 0.0)
        outer.update(1, "two of two")
        assert json.loads(path.read_text()) == {"fraction": 0.5, "text": "experiments · two of two"}
