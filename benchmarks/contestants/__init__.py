"""One file a contestant: `prepare(work, options)` returns (step, parameters).

`work` is that of a case (cases.py); `step()` does the work on one batch and returns when it is done; `parameters` is
the number of trainable ones, None for an input pipeline. Imported in a worker process, in the contestant's environment.
"""
