"""What goes wrong with files, and what is merely odd; `nucseg.data` adds images and missing data."""


class DataError(ValueError):
    """Files cannot be read or contradict each other; the message names the file, the reason and what to do."""


class AnnotationError(DataError):
    """An annotation file cannot be read at all."""


class AnnotationWarning(UserWarning):
    """Some annotated regions were skipped or are odd; the message lists them by id."""


class LabelWarning(UserWarning):
    """A label image was interpreted; the message names the file and what was done."""
