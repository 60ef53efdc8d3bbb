"""Traces of real programs: whether their time is found again under the names of the layers."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from xception_jax.logs.goodput import EVALUATION, INPUT, SAVING, STEPS, Stopwatch
from xception_jax.logs.profile import Operation, StepTrace, _own_time, format_operations, layer_of, read_trace

TRACED = 3


class Net(nn.Module):
    """One layer costs far more than the other."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(1, name="cheap")(x) * jnp.ones((1, 512))
        return nn.Dense(2048, name="dear")(x)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(directory of the trace, text of the program, what was reported) of some steps that took a gradient."""
    directory, reports = tmp_path_factory.mktemp("profile"), []
    x = jnp.ones((512, 8))
    params = Net().init(jax.random.key(0), x)

    def step(params):
        gradient = jax.grad(lambda params: jnp.square(Net().apply(params, x)).sum())(params)
        return jax.tree.map(lambda p, g: p - 1e-9 * g, params, gradient)

    compiled = jax.jit(step).lower(params).compile()
    stopwatch = Stopwatch(time.monotonic())
    trace = StepTrace(directory, TRACED, compiled.as_text, reports.append, stopwatch)
    with stopwatch.during(STEPS):
        for _ in range(8):
            with stopwatch.during(INPUT):
                time.sleep(0.1)
            with stopwatch.during(EVALUATION), stopwatch.during(SAVING):
                time.sleep(0.5)
            trace.before_step(params)
            params = compiled(params)
        trace.end(params)
    return directory, compiled.as_text(), reports


def test_the_dear_layer_comes_first_in_both_passes(traced):
    directory, hlo, _ = traced
    nanoseconds = read_trace(directory, hlo)
    by_layer = {}
    for (layer, direction, _), own in nanoseconds.items():
        by_layer[layer, direction] = by_layer.get((layer, direction), 0) + own
    assert all(own >= 0 for own in nanoseconds.values())
    for direction in ("forward", "backward"):
        assert by_layer["dear", direction] > by_layer.get(("cheap", direction), 0)
    assert nanoseconds.most_common(1)[0][0].layer == "dear"


def test_it_is_reported_once_with_a_row_an_operation(traced):
    head, columns, first, *_, end = traced[2]
    assert head.startswith(f"profile of {TRACED} steps, ")
    assert columns.split() == ["ms", "per", "step", "share", "layer", "pass", "operation"]
    assert "dear" in first
    assert end == f"trace: {traced[0]}"


def test_the_time_of_a_step_includes_its_input_and_no_evaluation_or_save(traced):
    milliseconds = float(re.search(r"steps, (\S+) ms each", traced[2][0])[1])
    assert 100 < milliseconds < 500


def test_other_programs_do_not_count(traced):
    directory, hlo, _ = traced
    assert not read_trace(directory, hlo.replace("HloModule jit_step", "HloModule jit_other"))


def test_a_run_that_is_too_short_says_so(tmp_path):
    reports = []
    trace = StepTrace(tmp_path, TRACED, str, reports.append, Stopwatch(time.monotonic()))
    trace.before_step(())
    trace.end(())
    assert reports == ["no profile: the run had fewer than 3 steps"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_interrupted_ends_its_trace(tmp_path):
    reports = []
    trace = StepTrace(tmp_path, TRACED, str, reports.append, Stopwatch(time.monotonic()))
    for _ in range(3):
        trace.before_step(())
    trace.close()
    trace.close()
    assert reports == [f"the profile ends early, after 1 steps: {tmp_path}"]
    assert list(tmp_path.glob("**/*.xplane.pb"))
    with jax.profiler.trace(tmp_path / "next"):  # raises if a trace is active
        pass


def test_without_a_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trace in"):
        read_trace(tmp_path, "")


@pytest.mark.parametrize(
    ("op_name", "layer", "direction"),
    [
        ("jit(train_step)/jvp(Xception)/block2_sepconv1/block2_sepconv1._spatial/spatial/cond/branch_0_fun/slice",
         "block2_sepconv1/spatial", "forward"),
        ("jit(train_step)/transpose(jvp(Xception))/block6_sepconv1_bn/mul", "block6_sepconv1_bn", "backward"),
        ("jit(train_step)/jvp(Xception)/jit(relu)/max", "-", "forward"),
        ("jit(train_step)/transpose(jvp(Xception))/cond/branch_0_fun/eq", "-", "backward"),
        ("jit(train_step)/while/body/closed_call/jvp(Xception)/head/predictions/dot_general", "head/predictions",
         "forward"),
        ("jit(train_step)/is_finite", "-", "update"),
        ("jit(step)/jvp(Net)/conv1/add;jit(step)/transpose(jvp(Net))/conv2/add", "conv1", "forward"),
        ("", "-", "update"),
    ],
)  # fmt: skip
def test_layers(op_name, layer, direction):
    assert layer_of(op_name) == (layer, direction)


class Event(NamedTuple):
    """What is read of an event of a trace."""

    start_ns: float
    duration_ns: float


def test_time_counts_once_whether_events_lie_inside_each_other_or_overlap():
    """Loops hold their bodies; kernels of one stream of a GPU overlap."""
    events = {"loop": Event(0, 10), "body": Event(2, 3), "kernel": Event(20, 10), "next": Event(28, 10)}
    own = dict(_own_time((event, name) for name, event in events.items()))
    assert own == {"loop": 7, "body": 3, "kernel": 8, "next": 10}


def test_the_table():
    nanoseconds = Counter(
        {Operation("conv1", "forward", "convolution"): 6e6, Operation("-", "update", "add_fusion"): 2e6},
    )
    assert format_operations(nanoseconds, steps=2, count=1).splitlines() == [
        "ms per step  share  layer  pass     operation",
        "       3.00  75.0%  conv1  forward  convolution",
    ]
