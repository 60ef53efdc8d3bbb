"""Measures how separable the kernels of regular convolutions are, and whether the measure can be trusted."""
