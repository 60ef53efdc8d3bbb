"""Fuzzes one target with Atheris: `python -m tests.fuzz.fuzz_target NAME FINDS [arguments of libFuzzer]`.

A find is an exception that is no `UserError`, an input that takes more than `SLOW` seconds of processor time, or one
that needs more than `MEMORY` bytes. The first of each kind is kept and fuzzing goes on. Crashes and hangs end the
process; libFuzzer keeps their inputs.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import sys
import traceback
import warnings
from pathlib import Path

import atheris

SLOW = 5.0
MEMORY = 512 << 20


def processor_seconds() -> float:
    """Returns the processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def main() -> None:
    """Fuzzes until libFuzzer ends the process."""
    name, finds = sys.argv[1], Path(sys.argv[2])
    logging.disable()
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["xception_jax"]):
        from tests.fuzz.targets import TARGETS, check, regressions

        for data in (TARGETS[name].seeds() | regressions(name)).values():
            check(name, data)  # imports everything that the target needs

    def keep(kind: str, data: bytes) -> None:
        path = finds / re.sub(r"[^\w.-]+", "-", kind)[:120]
        if not path.exists():
            path.write_bytes(data)
            print(f"FIND {kind}: {path}", flush=True)

    def run(data: bytes) -> None:
        start, before = processor_seconds(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            check(name, data)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "xception_jax" in frame.filename]
            frame = (ours or [frame])[-1]
            keep(f"{type(error).__name__} {Path(frame.filename).stem} {frame.lineno}", data)
        if (seconds := processor_seconds() - start) > SLOW:
            keep(f"slow {seconds:.0f}", data)
        if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10) > MEMORY:
            keep(f"memory {grown >> 20}", data)

    atheris.Setup([sys.argv[0], *sys.argv[3:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
