import fcntl
import io
import logging
import math
import os
import struct
import termios

import pytest
from absl import logging as absl_logging

from xception_jax.logs.console import (
    Progress,
    ProgressLine,
    Throughput,
    format_count,
    format_duration,
    format_header,
    format_progress,
)

PROGRESS = Progress(1250, 46_900, 2.667, 0.43219, 0.045, 612.3, 0.031, 4330)
LINE = "step 1,250/46,900  epoch 2.67  loss 0.4322  612 images/s  input 3%  lr 0.045  1h 12m left"
CLEAR = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self):
        return True


# --- formatting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (22_855_952, "22.9 M"), (8_357_403_496, "8.36 G"), (999_999, "1.00 M")],
)
def test_format_count(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (125, "2m 05s"),
        (3599.7, "1h 00m"),
        (93_600, "1d 02h"),
        (-3, "0s"),
        (math.nan, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_format_header_aligns_values():
    assert format_header("xception", [("devices", "8 x H100"), ("mesh", "data=8\nfsdp=1")]) == (
        "xception\n  devices  8 x H100\n  mesh     data=8\n           fsdp=1"
    )


def test_format_progress():
    assert format_progress(PROGRESS) == LINE
    assert format_progress(Progress(1, 10, 0.1, math.nan, 1e-5)) == "step 1/10  epoch 0.10  loss nan  lr 1e-05"


def test_a_narrow_line_leaves_out_what_matters_least():
    order = ["lr", "input", "epoch", "images/s", "left", "loss"]  # the first goes first
    kept = []
    for width in range(1, len(LINE) + 1):
        line = format_progress(PROGRESS, width)
        assert len(line) <= width
        assert line == LINE[:width] or set(line.split("  ")) <= set(LINE.split("  "))
        present = [name in line for name in order]
        assert present == sorted(present), line
        kept.append(sum(present))
    assert sorted(set(kept)) == [0, 1, 2, 3, 4, 5, 6]
    assert line == LINE


# --- the line --------------------------------------------------------------------------------------------------------


def test_without_a_terminal_only_log_points_make_plain_lines():
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.show(PROGRESS, log_point=False)
    line.show(PROGRESS, log_point=True)
    line.message("evaluating")
    line.close()
    assert stream.getvalue() == f"{LINE}\nevaluating\n"


def test_a_terminal_shows_one_line_cleared_before_other_output(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(ProgressLine, "_SECONDS_BETWEEN_UPDATES", 0.0)
    stream = Terminal()
    line = ProgressLine(stream)
    shown = format_progress(PROGRESS, 79)
    line.show(PROGRESS, log_point=False)
    line.show(PROGRESS, log_point=True)
    line.message("saved")
    line.message("again")
    line.show(PROGRESS, log_point=False)
    line.close()
    line.close()
    assert stream.getvalue() == f"{CLEAR}{shown}{CLEAR}{shown}{CLEAR}saved\nagain\n{CLEAR}{shown}\n"


def test_a_terminal_is_not_flooded_between_log_points(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    line = ProgressLine(stream)
    for _ in range(100):
        line.show(PROGRESS, log_point=False)
    assert stream.getvalue().count(CLEAR) < 5
    line.show(PROGRESS, log_point=True)
    assert stream.getvalue().count(CLEAR) > 1
    line.close()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ProgressLine(stream).show(PROGRESS, log_point=True)
    assert stream.getvalue() == LINE + "\n"


def test_records_of_logging_clear_the_line_first(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    handler = logging.StreamHandler(stream)
    logging.root.addHandler(handler)
    try:
        line = ProgressLine(stream)
        line.show(PROGRESS, log_point=True)
        logging.getLogger("somewhere").warning("disk full")
        assert stream.getvalue().endswith(f"left{CLEAR}disk full\n")
        line.show(PROGRESS, log_point=True)
        record = logging.LogRecord("absl", logging.WARNING, __file__, 1, "from absl", (), None)
        absl_logging.get_absl_handler().python_handler.filter(record)
        assert stream.getvalue().endswith(f"left{CLEAR}")
        line.close()
        assert handler.filters == []
        assert absl_logging.get_absl_handler().python_handler.filters == []
    finally:
        logging.root.removeHandler(handler)


@pytest.mark.parametrize("columns", [30, 60, 200])
def test_the_line_fits_a_real_terminal(columns, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "7")  # of another terminal
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w", encoding="utf-8") as stream:
        line = ProgressLine(stream)
        line.show(PROGRESS, log_point=True)
        shown = os.read(master, 1000).decode().removeprefix(CLEAR)
        line.close()
    os.close(master)
    assert shown == format_progress(PROGRESS, columns - 1)


def test_a_stream_that_fails_does_not_stop_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    line = ProgressLine(stream)
    line.show(PROGRESS, log_point=True)
    line.message("still here")
    line.close()
    with pytest.raises(BrokenPipeError):
        stream.close()
    closed = io.StringIO()
    closed_line = ProgressLine(closed)
    closed.close()
    closed_line.message("still here")


# --- throughput ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def run_steps(throughput, clock, first, last, seconds=0.5, every=10):
    for step in range(first, last + 1):
        clock.now += seconds
        if step % every == 0:
            throughput.mark(step)


def test_compiling_does_not_count(clock):
    throughput = Throughput(32, clock=clock)
    assert throughput.images_per_second is throughput.input_share is throughput.seconds_left(10) is None
    clock.now += 60
    throughput.mark(1)
    assert throughput.images_per_second is None
    run_steps(throughput, clock, 2, 10)
    assert throughput.images_per_second == pytest.approx(64)
    assert throughput.input_share == 0
    assert throughput.seconds_left(100) == pytest.approx(50)


def test_pauses_do_not_count_as_training_but_in_the_time_left(clock):
    throughput = Throughput(32, clock=clock)
    with throughput.paused():  # before the first step there is nothing to extrapolate from
        clock.now += 1000
    throughput.mark(0)
    for start in (1, 11, 21):
        run_steps(throughput, clock, start, start + 4)
        with throughput.paused():  # an evaluation between two marks
            clock.now += 20
        run_steps(throughput, clock, start + 5, start + 9)
    assert throughput.images_per_second == pytest.approx(64)
    assert throughput.seconds_left(10) == pytest.approx(10 * 0.5 + 20)


def test_an_interval_in_which_the_process_was_stopped_changes_nothing(clock):
    throughput = Throughput(32, clock=clock)
    throughput.mark(0)
    run_steps(throughput, clock, 1, 10)
    clock.now += 3600
    run_steps(throughput, clock, 11, 20)
    assert throughput.images_per_second == pytest.approx(64)
    run_steps(throughput, clock, 21, 100)
    assert throughput.images_per_second == pytest.approx(64)


def test_a_speed_that_changes_is_followed(clock):
    throughput = Throughput(32, window=5, clock=clock)
    throughput.mark(0)
    run_steps(throughput, clock, 1, 100)
    run_steps(throughput, clock, 101, 200, seconds=1.0)
    assert throughput.images_per_second == pytest.approx(32)


def test_share_of_waiting_for_input(clock):
    throughput = Throughput(32, clock=clock)
    throughput.mark(0)
    for step in range(1, 21):
        with throughput.waiting():
            clock.now += 0.1
        clock.now += 0.3
        if step % 10 == 0:
            throughput.mark(step)
    assert throughput.input_share == pytest.approx(0.25)


def test_a_step_marked_twice_is_no_interval(clock):
    throughput = Throughput(32, clock=clock)
    throughput.mark(0)
    throughput.mark(0)
    assert throughput.images_per_second is None
