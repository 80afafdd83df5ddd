"""The label-map contract, stated once: 2-D integers, 0 = background, one positive id per nucleus.

Ids need not be contiguous, and one id in several pieces is one nucleus (REFERENCE 4.5). A binary mask is not a
label map: it would be one nucleus.

Label maps to train on may also hold `IGNORE` where nobody knows what is there, as in a pseudo-labelled crop where the
model was unsure: no loss looks at such a pixel. Truth, predictions and everything that is measured know every pixel.
"""

from __future__ import annotations

import numpy as np

IGNORE = -1  # neither nucleus nor background: unknown


def check_label_map(labels: np.ndarray, name: str = "labels", unknown: bool = False) -> np.ndarray:
    """Return `labels` unchanged if it is a label map, and say what is wrong with it otherwise.

    Parameters
    ----------
    labels
        Candidate label map, (H, W), any integer dtype, values >= 0.
    name
        The argument's name, for the message.
    unknown
        Whether `IGNORE` is allowed too.

    Raises
    ------
    TypeError
        If it is not an array of integers (boolean and float arrays are refused).
    ValueError
        If it is not 2-D or holds negative ids.
    """
    if not isinstance(labels, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(labels).__name__}")
    if labels.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: a label map holds integers, got {labels.dtype}; "
            "label a binary mask first, for example with skimage.measure.label"
        )
    if labels.ndim != 2:
        raise ValueError(f"{name}: a label map is 2-D, got shape {labels.shape}")
    lowest = IGNORE if unknown else 0
    if labels.dtype.kind == "i" and labels.size and labels.min() < lowest:
        raise ValueError(f"{name}: ids must be >= {lowest}, found {labels.min()}")
    return labels


def relabel(labels: np.ndarray) -> np.ndarray:
    """Renumber the ids of a label map to 1..n in their order, background and `IGNORE` kept; (H, W) int32.

    Examples
    --------
    >>> import numpy as np
    >>> relabel(np.array([[7, 7, 0, 3]])).tolist()
    [[2, 2, 0, 1]]
    """
    check_label_map(labels, unknown=True)
    largest = int(labels.max(initial=0))
    if largest > 4 * labels.size:  # too many numbers for a table of them
        values, labels = np.unique(labels, return_inverse=True)
        number = np.cumsum(values > 0, dtype=np.int32)
        number[values < 0] = IGNORE
        return number[labels]
    there = np.zeros(largest + 2, dtype=bool)
    there[labels] = True  # IGNORE, which is -1, takes the last place
    there[0] = there[-1] = False
    number = np.cumsum(there, dtype=np.int32)
    number[-1] = IGNORE
    return number[labels]
