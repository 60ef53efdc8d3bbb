from __future__ import annotations

import dataclasses
import fcntl
import logging
import math
import os
import select
import struct
import sys
import termios
import time

import pytest
from absl import logging as absl_logging

from xception_jax.logs import console
from xception_jax.logs.console import (
    Progress,
    ProgressLine,
    Throughput,
    announce,
    format_count,
    format_duration,
    format_header,
    say,
)

PROGRESS = Progress(1250, 46_900, 2.667, 0.43219, 0.045, 612.3, 0.031, 4330)
LINE = "loss 0.4322  1h 12m left  612 images/s  epoch 2.67  lr 0.045  input 3%"


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


def test_progress_as_text():
    assert str(PROGRESS) == LINE
    assert str(Progress(1, 10, 0.1, math.nan, 1e-5)) == "loss nan  epoch 0.10  lr 1e-05"


# --- the line --------------------------------------------------------------------------------------------------------


END = "\x04"  # of what is written to the terminal


@pytest.fixture
def terminal(monkeypatch):
    """Returns a function that makes a pseudo-terminal of 100 columns standard error, and one that reads from it."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115

    def begin() -> None:  # in the test, since pytest sets sys.stderr between a fixture and its test
        monkeypatch.setattr(sys, "stderr", stream)

    def read() -> str:
        stream.write(END)
        stream.flush()
        received = ""
        while not received.endswith(END):  # a terminal passes on what it gets in pieces
            assert select.select([master], [], [], 60)[0], f"nothing after {received!r}"
            received += os.read(master, 100_000).decode()
        return received.removesuffix(END)

    yield begin, read
    stream.close()
    os.close(master)


def screen(text: str) -> list[str]:
    """Returns the lines that a person sees after this text: a carriage return goes back to the start of the line."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_without_a_terminal_only_log_points_make_plain_lines(capsys):
    with ProgressLine(46_900, 0) as line:
        line.show(PROGRESS, log_point=False)
        line.show(PROGRESS, log_point=True)
        say("evaluating")
    assert capsys.readouterr().err == f"step 1,250/46,900  {LINE}\nevaluating\n"


def test_messages_and_records_stand_on_lines_of_their_own_above_the_bar(terminal, monkeypatch):
    begin, read = terminal
    begin()
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.root, "handlers", [handler])  # absl adds its own in a process that has run a program
    with ProgressLine(46_900, 0) as line:
        line.show(PROGRESS, log_point=True)
        say("saved checkpoint 1250")
        line.show(PROGRESS, log_point=True)
        logging.getLogger("somewhere").warning("disk full")
        line.show(dataclasses.replace(PROGRESS, step=1300), log_point=True)
        say("SIGINT: stopping")
    assert handler.filters == []
    assert absl_logging.get_absl_handler().python_handler.filters == []
    text = read()
    lines = screen(text)
    assert lines[:3] == ["saved checkpoint 1250", "disk full", "SIGINT: stopping"], repr(text)
    assert lines[3].startswith("  3%  step 1300/46900  loss 0.4322")
    assert len(lines[3]) <= 100
    assert lines[4:] == [""]


def test_a_terminal_is_not_flooded_between_log_points(terminal):
    begin, read = terminal
    begin()
    with ProgressLine(46_900, 0) as line:
        for step in range(1000):
            line.show(dataclasses.replace(PROGRESS, step=step), log_point=False)
    assert read().count("\r") < 30


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    begin, read = terminal
    begin()
    monkeypatch.setenv("TERM", "dumb")
    with ProgressLine(46_900, 0) as line:
        line.show(PROGRESS, log_point=True)
    assert read() == f"step 1,250/46,900  {LINE}\r\n"


@pytest.mark.parametrize("terminal_type", ["xterm", "dumb"])
def test_a_stream_that_fails_does_not_stop_the_run(terminal_type, monkeypatch):
    monkeypatch.setenv("TERM", terminal_type)
    master, slave = os.openpty()
    stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressLine(46_900, 0) as line:
        stream.close()
        line.show(PROGRESS, log_point=True)
        say("still here")
        logging.getLogger("somewhere").debug("and here")
    os.close(master)


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


def test_only_what_takes_long_is_announced(monkeypatch):
    monkeypatch.setattr(console, "_SILENT_SECONDS", 60)
    lines = []
    with announce("short", lines.append):
        pass
    monkeypatch.setattr(console, "_SILENT_SECONDS", 0.05)
    with announce("long", lines.append):
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines == ["long ..."]
