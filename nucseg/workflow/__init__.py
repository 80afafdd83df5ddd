"""From unlabelled slides to label maps: `nucseg select`, `import-annotations`, `train`, `predict`, `evaluate`.

    select -> a pathologist outlines the nuclei of a few patches -> import_annotations -> train -> predict

Each step reads and writes one folder, so each can be looked at, corrected and repeated.
"""

from nucseg.workflow.base import WorkflowError, default_profile
from nucseg.workflow.outlines import import_annotations
from nucseg.workflow.prediction import predict_folder, segment_slide
from nucseg.workflow.scores import evaluate_folders
from nucseg.workflow.segmenter import load_model, train_folder, unlabelled_views
from nucseg.workflow.selecting import notes_for_reading, select_patches

__all__ = [
    "WorkflowError",
    "default_profile",
    "evaluate_folders",
    "import_annotations",
    "load_model",
    "notes_for_reading",
    "predict_folder",
    "segment_slide",
    "select_patches",
    "train_folder",
    "unlabelled_views",
]
