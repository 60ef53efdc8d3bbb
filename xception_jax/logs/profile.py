"""Profiles training steps: records a trace, and lists the most expensive operations by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from xception_jax.logs import goodput
from xception_jax.names import one_line

STEPS_BEFORE = 2  # steps before the trace; the first steps are slower, because they fill buffers and caches
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_MODULE = re.compile(r"HloModule ([\w.\-]+)")
# Parts of an op_name that are not layers: transformations, control flow, and method calls of Flax.
_NOT_A_LAYER = re.compile(
    r".*\(.*\)|.*\._?\w+|cond|while|body|scan|shard_map|closed_call|eval_jaxpr|checkpoint|custom_\w+|branch_\d+_fun|"
)


class Operation(NamedTuple):
    """A group of compiled operations in a profile.

    Attributes:
      layer: path of the layer in the network, such as 'block2_sepconv1/spatial', or '-' if outside of any layer.
      direction: 'forward', 'backward', or 'update' for everything else, such as the optimizer.
      kind: name of the compiled operation without its number, such as 'convolution' or 'add_multiply_fusion'.
    """

    layer: str
    direction: str
    kind: str


def layer_of(op_name: str) -> tuple[str, str]:
    """Returns (layer, direction) of an XLA op_name: 'jit(step)/jvp(Net)/conv1/add' is ('conv1', 'forward').

    If XLA has combined several operations, their names are separated by semicolons. The first one is used.
    """
    parts = op_name.partition(";")[0].split("/")
    layer = "/".join(part for part in parts[:-1] if not _NOT_A_LAYER.fullmatch(part))
    if any("transpose(" in part for part in parts):
        return layer or "-", "backward"
    return layer or "-", "forward" if layer or any("jvp(" in part for part in parts) else "update"


def read_trace(directory: Path, hlo: str) -> Counter[Operation]:
    """Returns the time in nanoseconds of each operation of one compiled program, from the newest trace in `directory`.

    Nested operations, such as the body of a loop, are counted once. Times are summed over threads and devices. Events
    name their operation in XLA's threads on CPU, and in its streams on GPU (kernels of a CUDA graph have no layer). For
    TPU this reads the line 'XLA Ops' of each device, as documented by XLA; it has not been tested on a TPU.

    Args:
      directory: the directory passed to `jax.profiler.trace`.
      hlo: text of the compiled program, `compiled.as_text()`, which maps operations to layers.

    Raises:
      FileNotFoundError: there is no trace.
    """
    names = dict(_INSTRUCTION.findall(hlo))
    module = _MODULE.search(hlo)
    traces = sorted(directory.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"no trace in {directory}")
    nanoseconds: Counter[Operation] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        lines = list(plane.lines)
        lines = [line for line in lines if line.name == "XLA Ops"] or lines
        on_device = plane.name.startswith("/device:")
        for line in lines:
            events = ((event, _instruction(event, on_device, module and module[1])) for event in line.events)
            for instruction, own in _own_time((event, name) for event, name in events if name):
                kind = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction)
                nanoseconds[Operation(*layer_of(names.get(instruction, "")), kind)] += round(own)
    return nanoseconds


def _instruction(event: Any, on_device: bool, module: str | None) -> str:
    """Returns the name of the HLO instruction of an event, or '' if it has none or is from another program."""
    stats = dict(event.stats)
    if stats.get("hlo_module", module) != module:
        return ""
    if "hlo_op" in stats:
        return str(stats["hlo_op"])
    written_out = re.match(r"%?([\w.\-]+) = ", event.name) if on_device else None
    return written_out[1] if written_out else ""


def _own_time(events: Iterable[tuple[Any, str]]) -> Iterable[tuple[str, float]]:
    """Yields the name and nanoseconds of each event, excluding the time during which a later event runs."""
    open_events: list[list[Any]] = []  # [end, name, own nanoseconds], the innermost last
    for event, name in sorted(events, key=lambda pair: (pair[0].start_ns, -pair[0].duration_ns)):
        while open_events and open_events[-1][0] <= event.start_ns:
            yield tuple(open_events.pop()[1:])
        if open_events:
            open_events[-1][2] -= min(event.duration_ns, open_events[-1][0] - event.start_ns)
        open_events.append([event.start_ns + event.duration_ns, name, event.duration_ns])
    for _, name, own in open_events:
        yield name, own


def format_operations(nanoseconds: Counter[Operation], steps: int, count: int = 10) -> str:
    """Formats a table of the `count` most expensive operations: milliseconds per step, share, layer, kind."""
    total = nanoseconds.total()
    rows = [
        (f"{own / steps / 1e6:.2f}", f"{own / total:.1%}", layer, direction, kind)
        for (layer, direction, kind), own in nanoseconds.most_common(count)
    ]
    rows = [("ms per step", "share", "layer", "pass", "operation"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{ms:>{widths[0]}}  {share:>{widths[1]}}  {layer:{widths[2]}}  {direction:{widths[3]}}  {kind}"
        for ms, share, layer, direction, kind in rows
    )


class StepTrace:
    """Traces a number of training steps once on process 0, and reports their most expensive operations.

    Args:
      directory: directory for the trace, which TensorBoard, XProf and Perfetto can open.
      steps: number of steps to trace, or 0 for none.
      hlo: returns the text of the compiled step.
      report: called with the finished table.
      stopwatch: knows the time of steps, without that of evaluations and saves between them.
    """

    def __init__(
        self,
        directory: Path,
        steps: int,
        hlo: Callable[[], str | None],
        report: Callable[[str], None],
        stopwatch: goodput.Stopwatch,
    ):
        self._directory, self._hlo, self._report, self._stopwatch = directory, hlo, report, stopwatch
        self._steps = steps if jax.process_index() == 0 else 0  # all hosts would write the same files
        self._calls, self._started = 0, 0.0

    def before_step(self, state: Any) -> None:
        """Starts or ends the trace if it is due, after waiting for `state`, the result of the previous step."""
        if self._steps:
            if self._calls == STEPS_BEFORE:
                jax.block_until_ready(state)
                self._attempt(self._start)
                self._started = self._stopwatch.seconds_of_steps()
            self._calls += 1
            if self._calls == STEPS_BEFORE + 1 + self._steps:
                self.end(state)

    def end(self, state: Any) -> None:
        """Ends the trace, if one is active, and reports it."""
        steps, self._steps = self._steps, 0
        if not steps:
            return
        traced = min(steps, self._calls - STEPS_BEFORE)
        if traced < 1:
            self._report(f"no profile: the run had fewer than {STEPS_BEFORE + 1} steps")
            return
        jax.block_until_ready(state)
        seconds = self._stopwatch.seconds_of_steps() - self._started
        self._attempt(self._finish, traced, seconds)

    def close(self) -> None:
        """Stops the trace if it is still active, because the run was interrupted or failed."""
        if self._steps and self._calls > STEPS_BEFORE:
            self._steps = 0
            self._attempt(self._cut)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Runs a part of the trace. Whatever its libraries raise, such as on a full disk, training continues."""
        try:
            with self._stopwatch.during(goodput.EVALUATION):
                action(*arguments)
        except Exception as error:
            self._steps = 0
            reason = one_line(error)[:200]
            self._report(f"no profile, training continues: {type(error).__name__}: {reason}")

    def _start(self) -> None:
        self._directory.mkdir(exist_ok=True)  # the profiler itself would write nothing, and not say so
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # otherwise most of the file would be Python calls
        jax.profiler.start_trace(self._directory, profiler_options=options)

    def _cut(self) -> None:
        jax.profiler.stop_trace()
        self._report(f"the profile ends early, after {self._calls - STEPS_BEFORE} steps: {self._directory}")

    def _finish(self, traced: int, seconds: float) -> None:
        jax.profiler.stop_trace()
        nanoseconds = read_trace(self._directory, self._hlo() or "")
        head = (
            f"profile of {traced} steps, {seconds / traced * 1e3:.1f} ms each; the operations of a step sum to "
            f"{nanoseconds.total() / traced / 1e6:.1f} ms over all threads or devices"
        )
        for line in (head, *format_operations(nanoseconds, traced).split("\n"), f"trace: {self._directory}"):
            self._report(line)
