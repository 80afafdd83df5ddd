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


@pytest.mark.parametrize("notebook", [False, True])
def test_what_failed_or_was_stopped_is_not_reported_as_done(monkeypatch, capsys, notebook):
    monkeypatch.setattr(progress, "_quiet", lambda: False)
    monkeypatch.setattr(progress, "_in_notebook", lambda: notebook)
    with pytest.raises(KeyboardInterrupt), task("all images"), task("training", 10):
        raise KeyboardInterrupt
    shown = "".join(capsys.readouterr())
    assert "100 %" not in shown
    assert " s)" not in shown
    with task("training", 10):
        pass
    shown = "".join(capsys.readouterr())
    assert ("100 %" if notebook else "training (0.0 s)") in shown


def test_a_kernel_reports_to_the_file_that_its_parent_watches(tmp_path, monkeypatch):
    path = tmp_path / "progress"
    monkeypatch.setenv("NUCSEG_PROGRESS", str(path))
    monkeypatch.setattr(progress, "_last", 0.0)
    with task("experiments", 2) as outer:
        monkeypatch.setattr(progress, "_last", 0.0)
        outer.update(1, "two of two")
        assert json.loads(path.read_text()) == {"fraction": 0.5, "text": "experiments · two of two"}


ROWS = [{"iteration": 10, "total": 2.0}, {"iteration": 20, "total": 1.5, "val": 0.41}, {"iteration": 30, "total": 1.25}]


def test_each_validation_of_a_training_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_quiet", lambda: False)
    monkeypatch.setattr(progress, "_in_notebook", lambda: False)
    with task("training hoverlite", 30) as training:
        for row in ROWS:
            training.measured(row)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "training hoverlite: iteration 20, loss 1.500, validation AJI 0.410"
    assert "training hoverlite · loss 1.250" in last


def test_in_a_notebook_the_curve_grows_in_its_place(monkeypatch):
    figures = []

    class Handle:
        def update(self, figure):
            figures.append(figure)

    def display(figure, display_id):
        figures.append(figure)
        return Handle()

    monkeypatch.setattr(progress, "_quiet", lambda: False)
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    with task("training hoverlite", 30) as training:
        for row in ROWS:
            training.measured(row)
    assert len(figures) == 2  # the first row and the last; in between too little time has gone by
    loss, validation = figures[-1].axes
    assert loss.lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.5], [30, 1.25]]
    assert validation.lines[0].get_xydata().tolist() == [[20, 0.41]]
