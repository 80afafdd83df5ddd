"""Which pixel to annotate: label-efficient nuclei segmentation (arXiv 2212.10305), reproducible and notebook-first.

Docstrings cite facts, open questions (A1 to A44) and their resolutions as REFERENCE: docs/reference.md in the checkout.
"""

__version__ = "0.1.0"
