"""Measures how separable the kernels of regular convolutions are, and whether the measure can be trusted."""

TRUE_LABELS, RANDOM_LABELS = "true_labels", "random_labels"
"""Arms of studies/kernels that differ only in the labels of their few images."""
