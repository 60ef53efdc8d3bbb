"""Reads all seeds, and all inputs that fuzzing once found, through all targets."""

from __future__ import annotations

import contextlib
import faulthandler
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.fuzz.kernels import build_kernels, kernel_seeds
from tests.fuzz.readers import SEPARATOR
from tests.fuzz.riegeli import BLOCK_HEADER, CHUNK_HEADER, signed
from tests.fuzz.targets import REGRESSIONS, TARGETS, check, regressions
from xception_jax.errors import UserError

SECONDS = 5
"""Limit of CPU time for one input, far above what any needs."""


@contextlib.contextmanager
def limited(label: str) -> Iterator[None]:
    """Raises TimeoutError after `SECONDS`. If a library does not return for long, the process ends with its stacks."""

    def stop(*_: object) -> None:
        raise TimeoutError(label)

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(60 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_regressions_are_read_or_refused(name):
    seeds = TARGETS[name].seeds()
    assert seeds
    check(name, next(iter(seeds.values())))  # imports what the target needs
    for label, data in (seeds | regressions(name)).items():
        assert len(data) <= TARGETS[name].longest, f"{label}: the fuzzer would cut it"
        with limited(label):
            check(name, data)


def test_headers_of_shards_are_signed_as_the_library_does():
    head, _, tail = TARGETS["array_record"].seeds()["four"].partition(SEPARATOR)
    content = head.ljust(65536, b"\0") + tail
    chunks = BLOCK_HEADER, BLOCK_HEADER + CHUNK_HEADER, 65536 + BLOCK_HEADER
    assert signed(content, chunks) == content
    assert signed(content[:9] + b"x" + content[10:], chunks) != content


def test_every_folder_of_regressions_belongs_to_a_target():
    assert {path.name for path in REGRESSIONS.iterdir() if path.is_dir()} <= {*TARGETS, "kernels"}


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("legacy_h5", "weights_h5", "keras", "timm")])
def test_a_target_accepts_a_good_file(name):
    accepted = 0
    for data in TARGETS[name].seeds().values():
        with contextlib.suppress(UserError):
            TARGETS[name].read(data)
            accepted += 1
    assert accepted


@pytest.mark.kernels
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++")
def test_the_kernels_stay_within_their_arrays(tmp_path):
    try:
        program = build_kernels(tmp_path, with_fuzzer=False)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    for label, data in (kernel_seeds() | regressions("kernels")).items():
        (tmp_path / label).write_bytes(data)
    inputs = sorted(str(path) for path in tmp_path.iterdir() if path != program)
    done = subprocess.run([str(program), *inputs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
