"""Which pixel to annotate: label-efficient nuclei segmentation (arXiv 2212.10305), reproducible and notebook-first."""

__version__ = "0.1.0"
