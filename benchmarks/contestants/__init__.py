"""Implements the contestants, one module each: `prepare(work, options)` returns (step, parameters).

`work` is that of a case in cases.py. `step()` processes one batch and returns when it is done. `parameters` is the
number of trainable parameters, or None for an input pipeline. Worker processes import these modules, in the environment
of the contestant.
"""
