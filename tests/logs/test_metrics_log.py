import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from xception_jax.errors import WorkdirError
from xception_jax.logs.metrics_log import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_steps(path, steps, start=0):
    log = MetricsLog(path, start)
    for step in steps:
        log.write(step, "train", {"loss": 1 / step})
    log.close()


def steps_of(path):
    return [entry["step"] for entry in read_metrics(path)]


@contextlib.contextmanager
def no_file_larger_than(size):
    """What a full disk does: a write is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_entries_are_one_object_a_line_with_step_and_split(path):
    log = MetricsLog(path)
    log.write(10, "train", {"loss": np.float32(0.5), "bad_steps": np.int64(2), "note": [1.5], "done": True})
    log.write(np.int32(20), "dev", {"top1": jnp.asarray(0.25), "loss": jnp.asarray(1.5, jnp.bfloat16)})
    # On the disk as soon as `write` has returned, not at the end.
    assert path.read_text().splitlines() == [
        '{"step": 10, "split": "train", "loss": 0.5, "bad_steps": 2, "note": [1.5], "done": true}',
        '{"step": 20, "split": "dev", "top1": 0.25, "loss": 1.5}',
    ]
    log.close()


def test_a_value_that_is_not_a_scalar_is_refused_and_nothing_written(path):
    log = MetricsLog(path)
    with pytest.raises(ValueError, match="size 1"):
        log.write(1, "train", {"loss": np.zeros(2)})
    log.write(2, "train", {"loss": 0.0})
    log.close()
    assert steps_of(path) == [2]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(path):
    log = MetricsLog(path)
    log.write(1, "train", {"loss": math.nan, "grad_norm": jnp.inf, "scale": np.float32(-np.inf)})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    entry = json.loads(path.read_text(), parse_constant=refuse)
    assert (entry["loss"], entry["grad_norm"], entry["scale"]) == (None, None, None)
    read = read_metrics(path)[0]
    assert all(math.isnan(read[name]) for name in ("loss", "grad_norm", "scale"))


def test_reading_before_there_is_a_file_gives_nothing(path):
    assert read_metrics(path) == []


def test_a_resume_drops_what_it_will_write_again(path):
    write_steps(path, range(10, 101, 10))
    log = MetricsLog(path, step=70)
    assert steps_of(path) == [10, 20, 30, 40, 50, 60, 70]
    log.write(80, "train", {"loss": 0.0})
    log.close()
    assert steps_of(path) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_a_resume_that_drops_nothing_leaves_the_file_alone(path):
    write_steps(path, [10, 20])
    before = path.stat().st_ino
    write_steps(path, [30], start=20)
    assert (path.stat().st_ino, steps_of(path)) == (before, [10, 20, 30])


def test_has_tells_what_was_written_before_and_after_a_resume(path):
    write_steps(path, [10, 20])
    log = MetricsLog(path, 10)
    assert log.has(10, "train")
    assert not log.has(10, "dev")
    assert not log.has(20, "train")
    log.write(20, "train", {})
    assert log.has(20, "train")
    log.close()


def test_a_torn_last_line_is_repaired_wherever_it_was_cut(path, caplog):
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps_of(path) == [1, 2]
        caplog.clear()
        write_steps(path, [3], start=3)
        assert path.read_bytes() == whole, end
        assert len(caplog.records) == 1


def test_a_last_line_that_lacks_only_its_newline_is_kept(path):
    write_steps(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(path, [3], start=2)
    assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b"\xff\xfe",
        b"[1]",
        b"3",
        b'{"step": "x", "split": "train"}',
        b'{"step": 1}',
        b'{"step": 1, "split": "dev", "seconds": "abc"}',
        b'{"step": 1, "split": "dev", "count": 9, "loss": [[1]]}',
        b'{"step": 1, "split": "dev", "count": 9, "loss": [1]}',
        b'{"step": 1, "split": "test", "top1": 0.5, "count": 9.5}',
        b'{"step": 1, "split": "interval", "loss": [1, 2], "top1": [1]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_in_the_middle_is_left_out(path, line, caplog):
    write_steps(path, [1])
    with path.open("ab") as file:
        file.write(line + b"\n")
    write_steps(path, [2], start=1)
    assert steps_of(path) == [1, 2]
    assert len(path.read_bytes().splitlines()) == 2
    assert "1 damaged line" in caplog.text


@pytest.mark.parametrize("seconds", [0.01, 0.06])
def test_a_run_that_is_killed_leaves_whole_lines_and_none_twice(path, seconds):
    program = (
        "import sys; from xception_jax.logs.metrics_log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1]); print('ready', flush=True)\n"
        "for step in range(10**9): log.write(step, 'interval', {'loss': 0.1 * step, 'note': [1] * 300})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while not path.exists() or b"\n" not in path.read_bytes():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    steps = steps_of(path)
    assert steps
    assert steps == list(range(len(steps)))
    resume = len(steps) // 2
    write_steps(path, [resume + 1, resume + 2], start=resume)
    assert steps_of(path) == list(range(resume + 3))


def test_the_first_entry_of_a_start_replaces_what_is_dropped(path):
    first = "start", {"time_lost": 5.0}
    MetricsLog(path, 0, first).close()
    with contextlib.closing(MetricsLog(path, 0)) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": 1.0})
    MetricsLog(path, 2, first).close()
    assert [(entry["step"], entry["split"]) for entry in read_metrics(path)] == [
        *((0, "start"), (1, "train"), (2, "train")),
        (2, "start"),
    ]
    assert read_metrics(path)[-1]["time_lost"] == 5.0


def test_a_full_disk_is_one_warning_and_loses_nothing(path, caplog):
    log = MetricsLog(path)
    log.write(1, "train", {"loss": 1.0})
    size = path.stat().st_size
    with no_file_larger_than(size + 20):  # a part of the next line fits
        for step in (2, 3, 4):
            log.write(step, "train", {"loss": 1.0})
            assert path.stat().st_size == size  # whole lines only
        log.sync()
    assert steps_of(path) == [1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "File too large" in caplog.text
    log.write(5, "train", {"loss": 1.0})
    assert steps_of(path) == [1, 2, 3, 4, 5]
    log.close()


def test_what_waits_can_be_read_and_is_written_at_the_end(path):
    log = MetricsLog(path)
    with no_file_larger_than(0):
        log.write(1, "train", {"loss": 1.0})
        log.write(2, "train", {"loss": math.inf})
    assert read_metrics(path) == []
    assert [entry["step"] for entry in log.waiting()] == [1, 2]
    assert math.isnan(log.waiting()[1]["loss"])
    log.write(3, "train", {"loss": 1.0})
    assert log.waiting() == []
    log.close()
    assert steps_of(path) == [1, 2, 3]


def test_closing_on_a_full_disk_says_how_many_are_lost(path, caplog):
    log = MetricsLog(path)
    with no_file_larger_than(0):
        log.write(1, "train", {})
        log.write(2, "train", {})
        log.close()
    assert "2 entries could not be written" in caplog.text


def test_a_repair_that_fails_leaves_the_file_as_it_was(path):
    write_steps(path, [1, 2, 3])
    before = path.read_bytes()
    with no_file_larger_than(10), pytest.raises(WorkdirError) as error:
        MetricsLog(path, 1)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_a_directory_in_the_place_of_the_file(path):
    path.mkdir()
    with pytest.raises(WorkdirError, match="cannot be used"):
        MetricsLog(path)


def test_a_run_that_begins_again_keeps_the_results_of_the_one_before(path, caplog):
    """As after its checkpoints were moved away, or with another experiment in its work directory."""
    write_steps(path, (10, 20))
    with contextlib.closing(MetricsLog(path, 20)) as log:
        log.write(20, "test", {"top1": 0.9, "count": 10})
    before = path.read_bytes()
    MetricsLog(path, 0).close()
    assert path.read_bytes() == b""
    (kept,) = path.parent.glob("metrics.*.jsonl")
    assert kept.read_bytes() == before
    assert kept.name in caplog.text
