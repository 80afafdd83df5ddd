"""Tables from made-up results: what is ours is computed, what is the paper's stays in its columns."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nucseg.experiments import GridSettings, experiments_of, grid
from nucseg.outcomes import NOT_IN_PROFILE, NOT_YET
from nucseg.paper import TABLES, rows
from nucseg.results import SCORES, ResultsError, check_results, empty_results
from nucseg.stats import holm, paired_tests, seed_test
from nucseg.tables import formats as table_formats
from nucseg.tables import make_table, make_tables, measure, over_seeds, write_table
from nucseg.tables.notes import needed_t
from nucseg.tables.side_by_side import table_4_of_all

SETTINGS = GridSettings(k1={"kumar": 9, "tnbc": 6, "tissue": 3}, rounds=2, seeds=(1, 2), random_seeds=(21, 100))
ORGANS = ("breast", "breast", "liver", "liver", "colon", "stomach")


def lines_of(experiment, scores, *, round=None, best=1, organs=ORGANS, **changes):
    """Lines of results.csv: one image per score; all metrics but AJI are AJI and a known offset."""
    made = []
    for number, aji in enumerate(scores):
        line = {
            **dataclasses.asdict(experiment),
            **{"profile": "sample", "fingerprint": "f00d", "encoder": "lite0", "supervision": experiment.supervision},
            **{"round": experiment.rounds if round is None else round, "best": best, "image_id": f"image {number}"},
            **{"organ": organs[number], "seen": int(organs[number] in ("breast", "liver"))},
            **{"label_share": 0.0123 * experiment.k1 if experiment.k1 else 1.0},
            **{name: aji + 0.001 * place for place, name in enumerate(SCORES)},
            **{"aji": aji, "n_true": 100, "n_pred": 90, "run_id": f"{experiment.seed:08d}abcd"},
        }
        made.append({**line, **changes})
    return pd.DataFrame(made)


def row(name):
    return next(r for r in rows(name.split(".")[0]) if r.id == name)


def made_up(dataset="kumar", settings=SETTINGS, tables=TABLES, seed=0):
    """Scores of 2 decimals below 0.39, which no printed AJI or Dice is."""
    rng = np.random.default_rng(seed)
    frames = []
    for experiment in grid(dataset, settings, tables):
        base = rng.uniform(0.1, 0.3)
        scores = base + rng.normal(0, 0.02, len(ORGANS))
        frames.append(lines_of(experiment, scores, best=int(experiment.rounds == 0)))
        if experiment.rounds:
            frames.append(lines_of(experiment, scores + 0.05, round=1))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def results():
    return made_up()


@pytest.fixture(scope="module")
def tissue():
    return made_up("tissue")


def line(table, name):
    return table.frame.set_index("id").loc[name]


def test_ours_is_the_mean_over_images_then_mean_and_deviation_over_seeds():
    first, second = experiments_of(row("I.cps"), "kumar", SETTINGS)
    lines = pd.concat([lines_of(first, [0.1, 0.3]), lines_of(second, [0.5, 0.7])])
    found = line(make_table("I", lines, "kumar", SETTINGS), "I.cps")
    assert found["ours AJI"] == pytest.approx(0.4)
    assert found["ours AJI sd"] == pytest.approx(np.std([0.2, 0.6], ddof=1))
    assert found["paper AJI"] == 0.4920
    assert found["AJI ours - paper"] == pytest.approx(0.4 - 0.4920)
    assert (found["images"], found["seeds"], found["status"]) == (2, 2, "run")
    assert found["ours label share"] == pytest.approx(9 * 0.0123)
    assert found["runs"] == "00000001 00000002"
    for name, place in (("AJI+", 2), ("PQ", 5), ("F1", 6), ("Dice", 0)):
        assert found[f"ours {name}"] == pytest.approx(0.4 + 0.001 * place)


def test_a_brief_table_has_the_rows_that_were_run_and_says_how_many_were_not():
    first, _ = experiments_of(row("I.cps"), "kumar", SETTINGS)
    table = make_table("I", lines_of(first, [0.1, 0.3]), "kumar", SETTINGS)
    brief = table.brief()
    assert list(brief.frame["id"]) == ["I.cps"]
    assert set(table.frame) - set(brief.frame) == {"ours AJI+", "ours F1", "runs"}
    assert brief.notes[-1].startswith("9 more rows were not run")
    assert len(make_table("I", empty_results(), "kumar", SETTINGS).brief().frame) == 10


def test_one_seed_has_no_deviation_and_says_that_seeds_are_missing():
    first, _ = experiments_of(row("I.cps"), "kumar", SETTINGS)
    table = make_table("I", lines_of(first, [0.1, 0.3]), "kumar", SETTINGS)
    found = line(table, "I.cps")
    assert np.isnan(found["ours AJI sd"])
    assert (found["seeds"], found["status"]) == (1, "1 of 2 seeds")
    assert "0.2000 (1 of 2 seeds)" in table._repr_html_()


@pytest.mark.parametrize(("weight", "word"), [(1.0, "mean teacher"), (0.0, "silent teacher"), (None, "")])
def test_a_teacher_in_place_of_the_papers_rounds_is_named_and_not_compared_with_it(weight, word):
    (experiment, _) = experiments_of(row("III.ours"), "kumar", SETTINGS)
    lines = lines_of(experiment, [0.2, 0.2])
    model = {"teacher": {"weight": weight}} if word else {}
    runs = pd.DataFrame({"run_id": lines["run_id"].unique(), "seconds": 1.0, "device": "cpu"})
    runs["config"] = json.dumps({"model": model})
    table = make_table("III", lines, "kumar", SETTINGS, runs=runs)
    found = line(table, "III.ours")
    assert found["row"] == ("Ours" + f" [{word}]" if word else "Ours")
    assert found["paper AJI"] == 0.5374
    assert np.isnan(found["AJI ours - paper"]) == bool(word)
    assert sum("teacher" in note for note in table.notes) == bool(word)


def test_seeds_with_and_without_a_teacher_are_no_row():
    lines = pd.concat([lines_of(e, [0.2, 0.2]) for e in experiments_of(row("III.ours"), "kumar", SETTINGS)])
    first, second = lines["run_id"].unique()
    runs = pd.DataFrame({"run_id": [first, second], "seconds": 1.0, "device": "cpu"})
    runs["config"] = [json.dumps({"model": {"teacher": {"weight": 1.0}}}), "{}"]
    with pytest.raises(ResultsError, match=r"III\.ours: some seeds were run with a mean teacher, some without"):
        make_table("III", lines, "kumar", SETTINGS, runs=runs)


def test_rows_that_are_the_same_runs_count_once_in_holms_correction():
    both = dataclasses.replace(SETTINGS, substitutes={"maskrcnn": "hoverlite", "hovernet": "hoverlite"})
    frame = make_table("IV", made_up(settings=both, tables=["III", "IV"]), "kumar", both).frame.set_index("id")
    tested = frame["t p"].dropna()
    assert tested["IV.mrcnn"] == tested["IV.hovernet"]
    np.testing.assert_allclose(
        frame.loc[tested.index, "t p Holm"].drop("IV.hovernet"), holm(tested.drop("IV.hovernet"))
    )
    assert frame["t p Holm"]["IV.hovernet"] == frame["t p Holm"]["IV.mrcnn"]


def test_the_last_round_is_reported_and_the_best_one_stands_beside_it():
    settings = dataclasses.replace(SETTINGS, seeds=(1,))
    (experiment,) = experiments_of(row("I.cps-plabel"), "kumar", settings)
    lines = pd.concat([lines_of(experiment, [0.2, 0.2], best=0), lines_of(experiment, [0.6, 0.6], round=1, best=1)])
    found = line(make_table("I", lines, "kumar", settings), "I.cps-plabel")
    assert found["ours AJI"] == pytest.approx(0.2)
    assert found["ours AJI best round"] == pytest.approx(0.6)
    # The best round alone is not the result that the table reports.
    assert line(make_table("I", lines[lines["round"] == 1], "kumar", settings), "I.cps-plabel")["status"] == NOT_YET


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dataset", ["kumar", "tissue", "tnbc"])
def test_a_table_without_results_has_printed_numbers_in_paper_columns_and_none_anywhere_else(table, dataset, tmp_path):
    made = make_table(table, empty_results(), dataset, SETTINGS)
    others = [name for name in made.frame if not name.startswith("paper") and name not in ("row", "id", "status")]
    for name in set(others) - {"images", "seeds", "runs", "compared with", "ours K1", "ours K2"}:
        assert made.frame[name].isna().all(), name
    assert set(made.frame["status"]) == {NOT_YET}
    for path in write_table(made, tmp_path):
        assert NOT_YET in path.read_text()
    if table != "V" or dataset == "kumar":
        assert any(name.startswith("paper") for name in made.frame)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dataset", ["kumar", "tissue"])
def test_no_printed_number_gets_into_a_column_of_ours(table, dataset, results, tissue):
    made = make_table(table, results if dataset == "kumar" else tissue, dataset, SETTINGS)
    printed = {f"{value:.4f}" for r in rows(table) for numbers in r.paper.values() for value in numbers.values()}
    header, body = table_formats.cells(made.frame)
    seen = 0
    for cells in body:
        for name, cell in zip(header, cells, strict=True):
            if name.startswith("ours"):
                numbers = set(re.findall(r"\d\.\d{4}", cell.text))
                assert not numbers & printed, (name, cell)
                seen += len(numbers)
    assert seen >= 8
    # and the other way round: a paper column holds nothing but printed numbers (the spread of Table V is their range)
    values = {value for r in rows(table) for numbers in r.paper.values() for value in numbers.values()}
    for name in made.frame:
        if name.startswith("paper") and name != "paper spread":
            assert set(made.frame[name].dropna()) <= values


def test_rows_without_results_say_whether_the_profile_runs_them(results, tmp_path):
    settings = dataclasses.replace(SETTINGS, rows={"IV": ("mrcnn", "dist", "hovernet-ours")})
    lines = results[~results["segmenter"].isin(["dist", "micronet"])]
    made = make_table("IV", lines, "kumar", settings)
    status = made.frame.set_index("id")["status"]
    assert status["IV.mrcnn"] == "run"
    assert status["IV.dist"] == NOT_YET
    assert status["IV.micronet"] == NOT_IN_PROFILE
    assert status["IV.hovernet"] == "run"  # there are results, whatever the profile asks for
    for path in write_table(made, tmp_path):
        assert NOT_YET in path.read_text()
        assert NOT_IN_PROFILE in path.read_text()


def test_table_4_says_what_each_system_started_from_and_which_are_our_reading(results):
    lines = results.assign(encoder=results["segmenter"].map({"dist": "unet (random weights)"}).fillna("lite0"))
    notes = " ".join(make_table("IV", lines, "kumar", SETTINGS).notes)
    assert "Encoders: dist unet (random weights); dpmsff lite0; hovernet lite0;" in notes
    assert "MDC-Net is our reading" in notes
    assert "DPMSFF is our reading" in notes
    without = make_table("IV", lines[~lines["segmenter"].isin(["mdcnet", "dpmsff"])], "kumar", SETTINGS)
    assert "our reading" not in " ".join(without.notes)


def test_seen_and_unseen_organs_are_means_of_the_same_images():
    settings = dataclasses.replace(SETTINGS, seeds=(1,))
    (experiment,) = experiments_of(row("III.ours"), "kumar", settings)
    lines = lines_of(experiment, [0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
    found = line(make_table("III", lines, "kumar", settings), "III.ours")
    assert found["ours AJI-s"] == pytest.approx(0.25)
    assert found["ours AJI-u"] == pytest.approx(0.7)
    assert found["ours AJI"] == pytest.approx(2.4 / 6)  # over images, not the mean of the two
    assert (found["paper AJI-s"], found["paper AJI-u"]) == (0.5348, 0.5408)


def test_table_5_shows_the_organs_at_hand_and_their_spread():
    settings = dataclasses.replace(SETTINGS, seeds=(1,))
    (experiment,) = experiments_of(row("V.mrcnn"), "kumar", settings)
    lines = lines_of(experiment, [0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
    made = make_table("V", lines, "kumar", settings)
    found = line(made, "V.mrcnn")
    assert found["ours breast"] == pytest.approx(0.15)
    assert found["ours spread"] == pytest.approx(0.8 - 0.15)
    assert found["paper spread"] == pytest.approx(0.6043 - 0.4355)  # 16.8 points, as the paper says
    assert [name for name in made.frame if name.startswith("paper")] == [
        *("paper stomach", "paper liver", "paper breast", "paper colon", "paper spread")
    ]
    assert np.isnan(line(made, "V.hovernet")["ours spread"])


def test_table_5_of_other_organs_has_no_paper_columns():
    settings = dataclasses.replace(SETTINGS, seeds=(1,))
    (experiment,) = experiments_of(row("V.mrcnn"), "tissue", settings)
    made = make_table("V", lines_of(experiment, [0.1, 0.2], organs=("glandular", "stromal")), "tissue", settings)
    assert not [name for name in made.frame if name.startswith("paper")]
    assert line(made, "V.mrcnn")["ours stromal"] == pytest.approx(0.2)


def test_comparisons_pair_images_after_averaging_seeds_and_correct_within_the_table(results):
    made = make_table("I", results, "kumar", SETTINGS)
    p, compared = [], 0
    for one in rows("I"):
        found = line(made, one.id)
        if one.reference is None:
            assert np.isnan(found["t p"])
            assert found["compared with"] == ""
            continue
        compared += 1
        means = []
        for name in (one.id, f"I.{one.reference}"):
            lines = [
                results[(results["seed"] == e.seed) & (results["selection"] == e.selection)
                        & (results["augmentation"] == "csingan") & (results["segmenter"] == "maskrcnn")
                        & (results["k1"] == 9) & (results["k2"] == 4)
                        & (results["rounds"] == e.rounds) & (results["round"] == e.rounds)]["aji"].to_numpy()
                for e in experiments_of(row(name), "kumar", SETTINGS)
            ]  # fmt: skip
            means.append(np.mean(lines, axis=0))
        expected = paired_tests(*means)
        assert found["t p"] == pytest.approx(stats.ttest_rel(*means).pvalue)
        assert found["mean difference"] == pytest.approx(expected.mean_difference)
        assert (found["CI low"], found["CI high"]) == pytest.approx((expected.ci_low, expected.ci_high))
        assert found["Wilcoxon p"] == pytest.approx(expected.wilcoxon_p)
        p.append(found["t p"])
    assert compared == 8
    corrected = made.frame["t p Holm"].dropna()
    np.testing.assert_allclose(corrected, holm(p))


def test_substitutes_are_named_in_the_row_and_never_compared_with_another_segmenter():
    settings = dataclasses.replace(SETTINGS, substitutes={"maskrcnn": "hoverlite"}, keep=("I.cps",))
    made = make_table("I", made_up("tissue", settings), "tissue", settings)
    labels = made.frame.set_index("id")["row"]
    assert labels["I.cps"] == "CPS + MRCNN"
    assert labels["I.kmeans"] == "K-means + MRCNN [run with hoverlite]"
    assert np.isnan(line(made, "I.kmeans")["t p"])  # its reference ran with Mask R-CNN
    assert not np.isnan(line(made, "I.kmeans-plabel")["t p"])  # both ran with the substitute
    notes = " ".join(made.notes)
    assert "Comparisons: AJI of the row minus that of the CPS row" in notes
    assert "Not compared, because the reference was run with another segmenter: RndCrop" in notes
    assert "use hoverlite in place of the paper's maskrcnn" in notes


def test_a_row_that_was_not_run_names_no_substitute_and_no_comparison():
    settings = dataclasses.replace(SETTINGS, substitutes={"maskrcnn": "hoverlite"}, rows={"I": ("cps",)})
    made = make_table("I", made_up("tissue", settings), "tissue", settings)
    labels = made.frame.set_index("id")["row"]
    assert labels["I.cps"] == "CPS + MRCNN [run with hoverlite]"
    assert labels["I.kmeans"] == "K-means + MRCNN"
    assert not any(note.startswith("Comparisons:") for note in made.notes)


def test_a_row_that_is_the_same_run_as_its_reference_is_not_compared_with_itself():
    settings = dataclasses.replace(SETTINGS, substitutes={"maskrcnn": "hoverlite", "hovernet": "hoverlite"})
    made = make_table("IV", made_up("tissue", settings, ["IV"]), "tissue", settings)
    assert np.isnan(line(made, "IV.mrcnn-ours")["t p"])
    assert not np.isnan(line(made, "IV.mrcnn")["t p"])
    assert any(note.startswith("One and the same runs: MRCNN + Ours") for note in made.notes)


def test_best_and_second_best_of_table_4_are_marked_among_ours(results, tmp_path):
    made = make_table("IV", results, "kumar", SETTINGS)
    order = made.frame.sort_values("ours AJI", ascending=False)
    assert list(order["ours AJI rank"]) == list(range(1, 10))
    best, second = (f"{value:.4f}" for value in order["ours AJI"][:2])
    csv, markdown, latex, html = (path.read_text() for path in write_table(made, tmp_path))
    assert f"| **{best} ±" in markdown
    assert f"| *{second} ±" in markdown
    assert rf"\textbf{{{best} $\pm$" in latex
    assert f"<u>{second} ±" in html
    assert "ours AJI rank" in csv


def test_table_4_of_tnbc_stands_beside_the_numbers_printed_for_tnbc():
    made = make_table("IV", made_up("tnbc", tables=["IV"]), "tnbc", SETTINGS)
    assert line(made, "IV.hovernet-ours")["paper AJI"] == 0.6414
    assert not np.isnan(line(made, "IV.hovernet-ours")["AJI ours - paper"])
    assert "would need |t| = 2,128" in " ".join(made.notes)


def test_printed_numbers_of_other_data_are_headed_so_and_not_subtracted(tissue):
    made = make_table("I", tissue, "tissue", SETTINGS)
    assert line(made, "I.cps")["paper (Kumar) AJI"] == 0.4920
    assert made.frame["AJI ours - paper"].isna().all()
    assert "no difference is taken" in " ".join(made.notes)


def test_table_6_computes_label_shares_and_shows_the_k_that_were_run(tissue):
    made = make_table("VI", tissue, "tissue", SETTINGS)
    found = line(made, "VI.k1-12-csingan")
    assert (found["ours K1"], found["ours K2"]) == (4, 4)
    assert found["ours label share"] == pytest.approx(4 * 0.0123)
    assert found["paper (Kumar) label share"] == 0.07
    assert line(made, "VI.k2-8")["ours K2"] == 8


def trained_for(iterations):
    model = {"segmenter": ["maskrcnn", {}, "lite0"], "training": [{"iterations": iterations}, None, {}]}
    return json.dumps({"model": model})


def test_seeds_are_compared_as_pairs_only_where_they_annotate_the_same_patches():
    def lines(name, *means):
        seeds = zip(experiments_of(row(name), "kumar", SETTINGS), means, strict=True)
        return [lines_of(experiment, [mean, mean + 0.2]) for experiment, mean in seeds]

    everything = lines("II.csingan", 0.3, 0.5) + lines("II.naive", 0.2, 0.41)
    everything += lines("I.kmeans", 0.1, 0.3)
    same = line(make_table("II", pd.concat(everything), "kumar", SETTINGS), "II.naive")
    other = line(make_table("I", pd.concat(everything), "kumar", SETTINGS), "I.kmeans")
    for found, expected in (
        (same, seed_test([0.3, 0.51], [0.4, 0.6], same=True)),
        (other, seed_test([0.2, 0.4], [0.4, 0.6])),
    ):
        assert tuple(found[["seeds CI low", "seeds CI high", "seeds p"]]) == pytest.approx(expected[1:])
    header, body = table_formats.cells(make_table("I", pd.concat(everything), "kumar", SETTINGS).frame)
    [text] = [cell.text for cell in (r[header.index("over seeds: 95 % CI, p (Holm)")] for r in body) if cell.text]
    assert re.fullmatch(r"\[−0\.\d{4}, \+0\.\d{4}\] 0\.\d+ \(0\.\d+\)", text)


def test_seeds_that_annotate_other_patches_by_one_strategy_are_no_pairs():
    """Two profiles may draw from different pools: then one strategy and one seed are two choices."""

    def measured(means, nuclei):
        seeds = zip(experiments_of(row("II.naive"), "kumar", SETTINGS), means, strict=True)
        lines = pd.concat([lines_of(e, [mean, mean + 0.2], label_nuclei=nuclei) for e, mean in seeds])
        return measure((row("II.naive"),), lines, "kumar", SETTINGS)[0]

    one = measured((0.2, 0.5), 40)
    for nuclei, same in ((40, True), (90, False)):
        expected = seed_test([0.3, 0.6], [0.32, 0.61], same=same)
        assert over_seeds(one, measured((0.22, 0.51), nuclei)) == pytest.approx(expected)


def test_notes_say_what_was_run_on_what(results, tissue):
    runs = pd.DataFrame(
        {"run_id": ["00000001abcd", "00000002abcd", "elsewhere"], "seconds": [90.0, 60.0, 9e9], "device": "1 GPU"}
        | {"config": [trained_for(200), trained_for(200), trained_for(1)]}
    )
    notes = " ".join(make_table("II", results, "kumar", SETTINGS, runs=runs).notes)
    assert "Profile sample; dataset kumar, data version f00d; 6 test images with 600 nuclei; encoder lite0" in notes
    assert "seeds 1, 2." in notes
    assert "Time of 2 runs: 2.5 minutes on 1 GPU." in notes
    assert "2.38e-28, would need |t| = 427" in notes
    assert "SYNTHETIC" not in notes
    assert "SETTINGS" not in notes
    runs["config"] = [trained_for(200), trained_for(400), "{}"]
    notes = " ".join(make_table("II", results, "kumar", SETTINGS, runs=runs).notes)
    assert "NOT ALL WITH THE SAME SETTINGS: maskrcnn.training.iterations 200 in 1 run(s), 400 in 1 run(s)." in notes
    assert make_table("II", tissue, "tissue", SETTINGS).notes[0].startswith("SYNTHETIC DATA.")


@pytest.mark.parametrize(("p", "n", "t"), [(5.73e-35, 14, 1380), (5.60e-29, 14, 478), (7.81e-35, 13, 2128)])
def test_the_printed_p_values_need_the_t_that_the_notes_say(p, n, t):
    assert needed_t(p, n) == pytest.approx(t, rel=1e-3)


def test_images_without_a_nucleus_are_counted_in_the_notes(results):
    empty = results.copy()
    empty.loc[empty["image_id"] == "image 3", ["n_true", "n_pred"]] = 0
    assert "1 image(s) without a nucleus" in " ".join(make_table("I", empty, "kumar", SETTINGS).notes)


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.text = [], None

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.text = ""

    def handle_data(self, data):
        if self.text is not None:
            self.text += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.text)
            self.text = None


@pytest.mark.parametrize("table", TABLES)
def test_all_four_formats_show_the_same_cells(table, results, tmp_path):
    made = make_table(table, results, "kumar", SETTINGS)
    csv, markdown, latex, html = write_table(made, tmp_path)
    assert csv.name == f"table{TABLES.index(table) + 1}_kumar.csv"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in (csv, markdown, latex, html))
    header, body = table_formats.cells(made.frame)
    expected = [header, *[[cell.text for cell in cells] for cells in body]]

    parser = _Cells()
    parser.feed(html.read_text())
    assert parser.rows == expected

    lines = [text for text in markdown.read_text().splitlines() if text.startswith("|")]
    plain = [re.split(r"(?<!\\)\|", text)[1:-1] for text in lines]
    cleaned = [[re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)\*", "", cell)).strip() for cell in cells] for cells in plain]
    assert [cleaned[0], *cleaned[2:]] == expected

    inside = latex.read_text().split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
    tex = [re.split(r"(?<!\\)&", text.removesuffix(r"\\")) for text in inside.splitlines() if text.strip()]
    assert [len(cells) for cells in tex] == [len(header)] * len(expected)
    assert not re.search(r"(?<!\\)[%#_]", inside)

    read = pd.read_csv(csv)
    assert list(read.columns) == list(made.frame.columns)
    for name in made.frame.select_dtypes("number"):
        np.testing.assert_allclose(read[name].astype(float), made.frame[name].astype(float), rtol=1e-5)


def test_names_from_outside_cannot_break_a_page():
    header, body = table_formats.cells(pd.DataFrame({"row": ["<b>|&%"], "status": ["run"], "ours AJI": [0.5]}))
    page = table_formats.html_page("<caption>", header, body, ["a < b"])
    assert "<b>|" not in page
    assert "&lt;b&gt;|&amp;%" in page
    assert r"<b>\|&%" in table_formats.markdown("c", header, body, [])
    assert r"$<$b$>$$|$\&\%" in table_formats.latex("c", header, body, [])


def test_writing_again_replaces_and_a_suffix_keeps_apart(results, tmp_path):
    made = make_table("I", results, "kumar", SETTINGS)
    assert write_table(made, tmp_path) == write_table(made, tmp_path)
    other = write_table(made, tmp_path, suffix="_hoverlite")
    assert other[0].name == "table1_kumar_hoverlite.csv"
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("table", ["I", "V"])
def test_a_table_is_made_from_any_order_of_lines(table, results):
    shuffled = results.sample(frac=1, random_state=0)[sorted(results.columns)]
    one, other = (make_table(table, lines, "kumar", SETTINGS) for lines in (results, shuffled))
    pd.testing.assert_frame_equal(one.frame, other.frame)
    assert one.notes == other.notes


def test_all_six_tables_are_made_in_order():
    assert tuple(table.number for table in make_tables(empty_results(), "kumar", SETTINGS)) == TABLES


def test_a_dataset_without_results_has_tables_that_say_so(tmp_path):
    for table in make_tables(empty_results(), "tissue", SETTINGS):
        write_table(table, tmp_path)
    assert NOT_YET in (tmp_path / "table1_tissue.html").read_text()
    assert "Dataset tissue: no results yet." in (tmp_path / "table1_tissue.html").read_text()


def test_a_single_test_image_gives_differences_but_no_p_values(tmp_path):
    settings = dataclasses.replace(SETTINGS, seeds=(1,))
    frames = [
        lines_of(e, [aji]) for name, aji in (("II.naive", 0.2), ("II.csingan", 0.3))
        for e in experiments_of(row(name), "kumar", settings)
    ]  # fmt: skip
    made = make_table("II", pd.concat(frames), "kumar", settings)
    found = line(made, "II.naive")
    assert found["mean difference"] == pytest.approx(-0.1)
    assert np.isnan(
        [found[name] for name in ("CI low", "CI high", "t p", "t p Holm", "Wilcoxon p", "effect size")]
    ).all()
    assert "[n/a, n/a]" in write_table(made, tmp_path)[1].read_text()


def test_systems_that_score_the_same_on_every_image_do_not_differ():
    settings = dataclasses.replace(SETTINGS, seeds=(1,))
    frames = [
        lines_of(e, [0.2, 0.3, 0.4]) for name in ("II.naive", "II.csingan")
        for e in experiments_of(row(name), "kumar", settings)
    ]  # fmt: skip
    found = line(make_table("II", pd.concat(frames), "kumar", settings), "II.naive")
    assert (found["mean difference"], found["CI low"], found["CI high"]) == (0, 0, 0)
    assert (found["t p"], found["Wilcoxon p"], found["effect size"]) == (1, 1, 0)


def test_a_missing_score_never_gets_into_a_table():
    (experiment, _) = experiments_of(row("I.cps"), "kumar", SETTINGS)
    with pytest.raises(ResultsError, match="dice is nan for image image 1"):
        make_table("I", lines_of(experiment, [0.2, np.nan]), "kumar", SETTINGS)


def test_annotated_nuclei_are_shown_where_every_seed_counted_them():
    first, second = experiments_of(row("I.cps"), "kumar", SETTINGS)
    counted = lines_of(first, [0.1, 0.3], label_nuclei=1200)
    both = pd.concat([counted, lines_of(second, [0.1, 0.3], label_nuclei=1300)])
    assert line(make_table("I", both, "kumar", SETTINGS), "I.cps")["ours label nuclei"] == 1250
    assert "1,250" in make_table("I", both, "kumar", SETTINGS)._repr_html_()
    half = pd.concat([counted, lines_of(second, [0.1, 0.3])])
    assert np.isnan(line(make_table("I", half, "kumar", SETTINGS), "I.cps")["ours label nuclei"])


def test_every_table_has_aji_plus_and_pq(results):
    for table in make_tables(results, "kumar", SETTINGS):
        assert table.frame["ours AJI+"].notna().any()
        assert table.frame["ours PQ"].notna().any()


def test_the_second_best_is_marked_although_two_rows_are_the_same_best_run():
    settings = dataclasses.replace(SETTINGS, substitutes={"maskrcnn": "hoverlite", "hovernet": "hoverlite"}, seeds=(1,))
    frames = [
        lines_of(e, [aji, aji + 0.1]) for name, aji in (("IV.mrcnn", 0.3), ("IV.hovernet-ours", 0.2))
        for e in experiments_of(row(name), "tissue", settings)
    ]  # fmt: skip
    ranks = make_table("IV", pd.concat(frames), "tissue", settings).frame.set_index("id")["ours AJI rank"]
    assert (ranks["IV.mrcnn"], ranks["IV.hovernet"], ranks["IV.hovernet-ours"]) == (1, 1, 2)


def test_a_table_names_itself_in_a_terminal(results):
    assert repr(make_table("I", results, "kumar", SETTINGS)).startswith("Table I. Which patches")


def test_all_datasets_stand_side_by_side_in_table_4_each_with_its_own_best(tmp_path):
    settings = dataclasses.replace(SETTINGS, rows={"IV": ("mrcnn", "hovernet", "hovernet-ours")})
    datasets = {name: made_up(name, settings, ["IV"], seed).assign(fingerprint=name)
                for seed, name in enumerate(("kumar", "tissue"))}  # fmt: skip
    made = table_4_of_all(pd.concat(datasets.values(), ignore_index=True), settings)
    assert made.dataset == "all"
    for name, lines in datasets.items():
        alone = make_table("IV", lines, name, settings).frame
        called = {"kumar": "Kumar"}.get(name, name)
        for column in ("AJI", "AJI sd", "AJI rank", "Dice", "Dice rank"):
            np.testing.assert_array_equal(made.frame[f"ours {called} {column}"], alone[f"ours {column}"])
        np.testing.assert_array_equal(made.frame[f"{called} Wilcoxon p Holm"], alone["Wilcoxon p Holm"])
    assert made.frame.set_index("id").loc["IV.hovernet-ours", "paper TNBC AJI"] == 0.6414
    assert not [name for name in made.frame if name.startswith("paper tissue")]
    text = write_table(made, tmp_path)[1].read_text()
    assert "table4_all.md" in [path.name for path in tmp_path.iterdir()]
    assert text.count("**0.") == 4  # best AJI and Dice of two datasets
    assert "No results in this profile: TNBC." in text  # MoNuSeg has no K1 here
    assert text.count(NOT_IN_PROFILE) == 12  # six rows, once for each dataset with results
    assert "SYNTHETIC DATA" in text
    assert "would need |t| = 167 for Kumar, |t| = 2,128 for TNBC, |t| = 1,380 for MoNuSeg" in " ".join(made.notes)


def test_table_4_of_all_needs_results_of_some_dataset_it_knows(results):
    assert table_4_of_all(empty_results(), SETTINGS) is None
    assert table_4_of_all(results.assign(dataset="elsewhere"), SETTINGS) is None


def test_table_4_of_all_says_so_where_only_other_tables_were_run(tmp_path):
    made = table_4_of_all(made_up(tables=["I"]), SETTINGS)
    assert NOT_YET in write_table(made, tmp_path)[1].read_text()


def test_results_that_do_not_belong_together_are_refused(results):
    with pytest.raises(ResultsError, match="several profiles, paper, sample"):
        make_table("I", pd.concat([results, results.assign(profile="paper")]), "kumar", SETTINGS)
    with pytest.raises(ResultsError, match="with the encoders lite0, resnet50"):
        make_table("I", pd.concat([results, results.assign(encoder="resnet50")]), "kumar", SETTINGS)
    unfinished = results.drop(results[(results["selection"] == "kmeans") & (results["image_id"] == "image 2")].index)
    with pytest.raises(ResultsError, match="no result for image\\(s\\) image 2; run it to its end"):
        make_table("I", unfinished, "kumar", SETTINGS)
    with pytest.raises(ValueError, match="table: unknown name 'VII'"):
        make_table("VII", results, "kumar", SETTINGS)
    with pytest.raises(ValueError, match="no K1 for dataset 'elsewhere'"):
        make_table("I", results, "elsewhere", SETTINGS)


def test_other_datasets_in_the_file_change_nothing(results):
    both = pd.concat([results, made_up("tnbc", seed=1).assign(fingerprint="beef")], ignore_index=True)
    pd.testing.assert_frame_equal(
        make_table("I", both, "kumar", SETTINGS).frame, make_table("I", results, "kumar", SETTINGS).frame
    )


def test_the_made_up_results_are_valid(results):
    check_results(results)


def test_what_all_trainings_do_that_the_paper_does_not_name_stands_under_the_table():
    def found(rotate, table="II"):
        training = [
            {"lr": 0.1},
            {"rotate": rotate, "scale": [1.0, 1.0]},
            {"real": 0.4, "synthetic": 0.2, "pseudo": 0.4},
        ]
        config = json.dumps({"model": {"segmenter": ["hoverlite", {}, "lite0"], "training": training}})
        lines = made_up(tables=(table,))
        about = {"run_id": lines["run_id"].unique(), "config": config, "seconds": 60.0, "device": "CPU"}
        notes = make_table(table, lines, "kumar", SETTINGS, runs=pd.DataFrame(about)).notes
        return [note for note in notes if "whatever their number" in note or "also turns" in note]

    assert [note.split()[0] for note in found(180.0)] == ["Naive", "Annotated,"]
    assert "up to 180° and scales by 1 to 1" in found(180.0)[0]
    assert "0.4 : 0.2 : 0.4" in found(0.0)[0]
    assert len(found(0.0)) == 1


def test_images_of_one_patient_are_not_taken_for_independent():
    lines = made_up("tnbc", tables=("I",))
    names = dict(zip(sorted(lines["image_id"].unique()), ("09_1", "09_2", "10_1", "10_2", "11_1", "11_2"), strict=True))
    tnbc = lines.assign(image_id=lines["image_id"].map(names))

    def notes(results, dataset):
        return [
            note for note in make_table("I", results, dataset, SETTINGS).notes if "of one patient are alike" in note
        ]

    (note,) = notes(tnbc, "tnbc")
    assert note.startswith("The 6 images are of 3 patients")
    frame = make_table("I", tnbc, "tnbc", SETTINGS).frame
    for row, p in zip(frame["row"], frame["t p"], strict=True):
        assert (f"{row} 0." in note or f"{row} 1" in note) == (p < 0.05)
    clear = tnbc["aji"] + 0.1 * (tnbc["selection"] == "cps")
    (note,) = notes(tnbc.assign(aji=clear), "tnbc")
    assert "paired t-test over the patients' means" in note
    assert not notes(lines, "tnbc")  # images of unknown patients
    assert not notes(made_up(tables=("I",)), "kumar")
