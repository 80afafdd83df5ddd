"""The text above and under Tables I-VI: what was run on what, how to read it, and where the print slips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
from scipy import stats

from nucseg.data.layouts import rows as data_rows
from nucseg.data.tissue import SYNTHETIC_NOTE
from nucseg.paper import printed, rows
from nucseg.results.settings import differences
from nucseg.tables.departures import departures

TITLES = {
    "I": "Which patches to annotate: selection strategies, each followed by CSinGAN",
    "II": "Augmentation of the patches that CPS selects",
    "III": "The framework on seen and unseen organs",
    "IV": "Full supervision with every segmenter, and the framework with two of them",
    "V": "AJI by organ",
    "VI": "K1 and K2, without and with CSinGAN",
}
TEST_IMAGES = {"kumar": 14, "tnbc": 13, "monuseg": 14}  # of the paper
OF_TNBC = " (those of three patients; its author counts the last 20)"
OVER_SEEDS = (
    "Over seeds: 95 % interval and p of the same difference (in brackets after Holm's correction over the table), by "
    "t-test over the means of seeds (paired where both rows annotate the same patches, Welch's elsewhere): what other "
    "choices of patches and other weights would give on these images."
)
REFERENCES = {
    "I": "the CPS row of the same block",
    "II": "the CSinGAN row",
    "III": "the row 'Ours' (the paper tests nothing here)",
    "IV": "the row 'Hover-net + Ours'",
}
READINGS = {
    "mdcnet": "MDC-Net is our reading of its title (masks, contours, distances): no code of it is public.",
    "dpmsff": "DPMSFF is our reading of it: PFFNet that pastes instance masks into its semantic map, without "
    "consistency loss and mask-quality head.",
}
TEACHERS = {
    "mean teacher": "Rows marked [mean teacher] learn from the unlabelled pixels by a mean teacher, in a second "
    "training as long as the first, in place of the paper's rounds of pseudo labels; no difference to it is taken.",
    "silent teacher": "Rows marked [silent teacher] are a control: the second training of a mean teacher without its "
    "word on unlabelled pixels, so they have seen none.",
}
SLIPS = {
    "II": (
        "In print, 'CSinGAN(w/o CwD)' equals Table VI's 'K1 = 9 w/o CSinGAN', which is the naive augmentation, while "
        "NaiveAug is another number: one of the two is mislabelled.",
    ),
    "III": (
        "In print, AJI is the mean over images in rows a, b, Ours and full supervision, but the mean of AJI-s and "
        "AJI-u in rows c to f. Ours is the mean over images throughout.",
    ),
    "IV": (
        "The printed rows MDC_NET and DPMSFF are quoted from other papers; of MDC-Net no code was found.",
        "The printed Kumar AJI of Hover-net is not the mean of its organs in Table V, and it equals the value that "
        "PFFNet published for itself.",
        "The paper gives MoNuSeg's annotated share as 17 % and as 7 %; 18 patches are 3.9 % of its pixels.",
    ),
    "V": ("Spread is the highest minus the lowest organ.",),
    "VI": (
        "Label shares are computed: the union of the annotated pixels over the training pixels. K1 is scaled to the "
        "dataset; 'w/o CSinGAN' is the naive augmentation.",
    ),
}


def needed_t(p: float, n: int) -> float:
    """Return the |t| that a two-sided paired t-test over n images needs for a p-value."""
    return float(stats.t.isf(p / 2, n - 1))


def notes(
    table: str, dataset: str, source: str, measured: Sequence, used: pd.DataFrame, runs: pd.DataFrame | None
) -> tuple[str, ...]:
    """Return the paragraphs under a table; `used` are the lines of results.csv that stand behind its numbers."""
    found = [_provenance(dataset, used, runs)]
    if dataset == "tissue":
        found.insert(0, f"SYNTHETIC DATA. {SYNTHETIC_NOTE} These numbers say nothing about histology.")
    found.append(
        "Ours: the mean over all test images for each seed, then mean ± standard deviation over seeds; models of the "
        "last pseudo-labelling round ('best round': of the highest validation AJI, the training before any round among "
        "them). AJI is the official one, beside it AJI+, PQ and F1."
    )
    found += departures(used, runs)
    found += _comparisons(table, dataset, source, measured)
    if dataset == "kumar":
        found.append(
            "Kumar circulates in two versions with different annotations (the current release holds 16,959 nuclei), "
            "so differences from the paper of less than two points say nothing."
        )
    elif source != dataset:
        found.append(
            "The paper has no such numbers on these data: its columns are for Kumar, and no difference is taken."
        )
    found += SLIPS.get(table, ())
    if table == "V" and dataset == "kumar":
        found.append("The images called liver are lung by their TCGA site codes.")
    if table == "IV" and source == dataset:
        found += _footnotes(dataset)
    if table == "IV":
        found += _systems(used)
    found += _replaced(measured)
    found += [TEACHERS[word] for word in TEACHERS if any(one.teacher == word for one in measured)]
    found += _same_runs(measured)
    return tuple(found)


def notes_of_all(
    results: pd.DataFrame, found: Sequence[str], missing: Sequence[str], named: Callable[[str], str]
) -> tuple[str, ...]:
    """Return the paragraphs under Table IV of all datasets: those `found` have results, those `missing` have none."""
    made = []
    if "tissue" in found:
        made.append(f"SYNTHETIC DATA in the columns headed tissue. {SYNTHETIC_NOTE}")
    for dataset in found:
        lines = results[results["dataset"] == dataset]
        made.append(f"{named(dataset)}: {data_of(lines)}.")
    if missing:
        made.append(f"No results in this profile: {', '.join(missing)}.")
    made.append(
        "Ours: the mean over all test images for each seed, then mean ± standard deviation over seeds; models of the "
        f"last pseudo-labelling round. Wilcoxon p: against {REFERENCES['IV']} on the same dataset, paired by test "
        "image, in brackets after Holm's correction over the rows of that dataset. Each dataset's own Table IV says "
        "more."
    )
    smallest = {name: min(row.paper[name]["p"] for row in rows("IV") if "p" in row.paper[name]) for name in TEST_IMAGES}
    needed = [f"|t| = {needed_t(p, TEST_IMAGES[name]):,.0f} for {named(name)}" for name, p in smallest.items()]
    made.append(
        "The printed P-values cannot be paired t-tests over images: with the paper's 14, 13 and 14 test images the "
        f"smallest would need {', '.join(needed)}."
    )
    return (*made, *SLIPS["IV"])


def data_of(lines: pd.DataFrame) -> str:
    """Say what data, and which encoder, stand behind lines of results.csv of one dataset."""
    images = lines.drop_duplicates("image_id")
    return (
        f"data version {_all(lines['fingerprint'])}; {len(images)} test images with {images['n_true'].sum():,} nuclei; "
        f"encoder {_all(lines['encoder'])}"
    )


def of_patients(dataset: str, images: Iterable[str]) -> str:
    """Return a warning if several of the images are of one patient; nothing where that is not so, or not known."""
    images = set(images)
    patients = {_patients(dataset).get(image) for image in images}
    if None in patients or len(patients) == len(images):
        return ""
    return (
        f"The {len(images)} images are of {len(patients)} patients, and those of one patient are alike: intervals and "
        "P-values over images promise more than these data hold."
    )


def _patients(dataset: str) -> dict[str, str]:
    return {row.id: row.patient for row in data_rows(dataset)}


def _provenance(dataset: str, used: pd.DataFrame, runs: pd.DataFrame | None) -> str:
    if not len(used):
        return f"Dataset {dataset}: no results yet."
    seeds = ", ".join(map(str, sorted(used["seed"].unique())))
    text = f"Profile {_all(used['profile'])}; dataset {dataset}, {data_of(used)}; seeds {seeds}."
    empty = used[(used["n_true"] == 0) & (used["n_pred"] == 0)]["image_id"].nunique()
    if empty:
        text += f" {empty} image(s) without a nucleus were rightly left empty, which scores 1."
    if runs is not None:
        mine = runs[runs["run_id"].isin(set(used["run_id"]))].drop_duplicates("run_id")
        if len(mine):
            text += f" Time of {len(mine)} runs: {mine['seconds'].sum() / 60:.1f} minutes on {_all(mine['device'])}."
        if other := differences(mine["config"]):
            text += f" NOT ALL WITH THE SAME SETTINGS: {'; '.join(other)}."
    return text


def _comparisons(table: str, dataset: str, source: str, measured: Sequence) -> list[str]:
    if table not in REFERENCES:
        return []
    found = []
    if any(_reference(one, measured) for one in measured):
        found.append(
            f"Comparisons: AJI of the row minus that of {REFERENCES[table]}, paired by test image (seeds averaged "
            "first, so n is the number of images); 95 % bootstrap interval over images, paired t, Wilcoxon signed "
            "rank, in brackets after Holm's correction over this table."
        )
        pairs = [(one, _reference(one, measured)) for one in measured]
        if any(other and min(len(one.found), len(other.found)) > 1 for one, other in pairs):
            found.append(OVER_SEEDS)
        found += _over_patients(dataset, [(one, other) for one, other in pairs if other and _comparable(one, other)])
    apart = [one.label for one in measured if _other_segmenter(one, measured)]
    if apart and table != "IV":
        found.append(f"Not compared, because the reference was run with another segmenter: {'; '.join(apart)}.")
    p_values = [one.row.paper[source]["p"] for one in measured if "p" in one.row.paper[source]]
    if p_values:
        n = TEST_IMAGES[source]
        which = OF_TNBC if source == "tnbc" else ""
        found.append(
            f"The printed P-values cannot be paired t-tests over images: with the paper's {n} test images{which} the "
            f"smallest in this table, {min(p_values):.3g}, would need |t| = {needed_t(min(p_values), n):,.0f}. The "
            f"unit must have been patches or nuclei, which are not independent. The smallest Wilcoxon p that {n} "
            f"images can give is {2 / 2**n:.1e}."
        )
    return found


def _reference(one, measured: Sequence):
    """Return the row that a row is compared with, None where one of the two was not run."""
    reference = next((other for other in measured if other.row.key == one.row.reference), None)
    return reference if reference and one.found and reference.found else None


def _comparable(one, other) -> bool:
    return one.planned != other.planned and (one.row.table == "IV" or one.segmenter == other.segmenter)


def _over_patients(dataset: str, pairs: Sequence[tuple]) -> list[str]:
    """Say what is left of the differences over images where several images are of one patient."""
    text = of_patients(dataset, {image for one, _ in pairs for image in one.lines["image_id"]})
    if not text:
        return []
    patient, said = _patients(dataset), []
    for one, other in pairs:
        difference = one.images() - other.images()
        if difference.any() and stats.ttest_1samp(difference, 0.0).pvalue < 0.05:
            means = difference.groupby(patient).mean()
            said.append(f"{one.label} {stats.ttest_1samp(means, 0.0).pvalue:.2g}")
    if said:
        text += f" The paired t-test over the patients' means, where that over images has p < 0.05: {'; '.join(said)}."
    return [text]


def _other_segmenter(one, measured: Sequence) -> bool:
    reference = _reference(one, measured)
    return reference is not None and reference.segmenter != one.segmenter


def _replaced(measured: Sequence) -> list[str]:
    marked = [one for one in measured if "[run with" in one.label]
    olds = {new: sorted({one.row.spec.segmenter for one in marked if one.segmenter == new}) for new in
            sorted({one.segmenter for one in marked})}  # fmt: skip
    return [
        f"Rows marked [run with {new}] use {new} in place of the paper's {' and '.join(old)}."
        for new, old in olds.items()
    ]


def _systems(used: pd.DataFrame) -> list[str]:
    """Say what the segmenters of a table started from, and which are no reproductions."""
    by_name = used.groupby("segmenter")["encoder"].unique() if len(used) else {}
    starts = [f"{name} {_all(encoders)}" for name, encoders in by_name.items()]
    found = [f"Encoders: {'; '.join(starts)}."] if len(starts) > 1 else []
    return found + [text for name, text in READINGS.items() if name in by_name]


def _same_runs(measured: Sequence) -> list[str]:
    groups: dict[tuple, list[str]] = {}
    for one in measured:
        if one.found:
            groups.setdefault(one.planned, []).append(one.label)
    return [f"One and the same runs: {'; '.join(labels)}." for labels in groups.values() if len(labels) > 1]


def _footnotes(dataset: str) -> list[str]:
    name = {"kumar": "TCGA-KUMAR", "tnbc": "TNBC"}.get(dataset)
    lines = [line for line in printed("table4_footnotes.csv") if line["dataset"] == name]
    items = [f"{line['item']} {line['aji']}" + (f" / {line['dice']}" if line["dice"] else "") for line in lines]
    return [f"The paper's footnotes, AJI / Dice: {'; '.join(items)}."] if items else []


def _all(values: pd.Series) -> str:
    return ", ".join(sorted(map(str, values.unique())))
