"""Results that nobody measured, shared by the tests of what is made from results."""

import pandas as pd

from nucseg.config import to_plain
from nucseg.results import RESULT_COLUMNS


def lines_of(experiment, scores, **changes):
    """Lines of results.csv: one image per score."""
    rows = []
    for image, aji in enumerate(scores):
        row = dict.fromkeys(RESULT_COLUMNS, 0) | to_plain(experiment)
        row |= {"profile": "p", "fingerprint": "f", "encoder": "e", "supervision": experiment.supervision, "best": 1}
        row |= {"image_id": f"i{image}", "organ": "o", "run_id": "r", "round": experiment.rounds}
        row |= {"label_share": 0.005 * experiment.k1 if experiment.k1 else 1.0, "label_nuclei": 40 * experiment.k1}
        rows.append({**row, "aji": aji, **changes})
    return pd.DataFrame(rows)[list(RESULT_COLUMNS)]
