"""`xception-jax plan`: estimates memory, communication, time and cost of a run on chips you do not have."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xception_jax.command_line import at_least, read_config
from xception_jax.tools.planning.hosts import launch_commands
from xception_jax.tools.planning.topology import parse_topology, prepare_environment

if TYPE_CHECKING:
    from xception_jax.tools.planning.plan import Memory, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Compiles the training step of a config for TPUs you do not have. This takes minutes and needs libtpu. For "
        "GPUs, costs are counted from the layers. Override config fields as in `train`: --config.batch_size=16384"
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a config, named as in `train`")
    parser.add_argument(
        "--topology", required=True, help="chips, such as v5e:16x16, v6e:8x8, v4:4x4x4, v5p:4x4x4, h100:8"
    )
    parser.add_argument("--examples", type=at_least(1), help="images in an epoch, if the dataset is missing")
    parser.add_argument(
        "--bandwidth",
        type=at_least(1),
        default=100,
        metavar="MB",
        help="megabytes that a host writes to storage in a second, for the time of a checkpoint; default %(default)s",
    )
    parser.add_argument("--fit", action="store_true", help="find the largest batch that fits (several compilations)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the plan.

    Raises:
      UserError: the topology is unknown, the batch cannot be divided among the chips, libtpu is missing, or the step
        does not fit into memory.
    """
    topology = parse_topology(args.topology)
    config = read_config(args.config, args.overrides)
    prepare_environment()
    from xception_jax.config import resolve
    from xception_jax.tools.planning.plan import (  # JAX reads the environment when imported
        find_largest_batch,
        make_plan,
    )

    config, overrides = resolve(config), list(args.overrides)
    options: dict[str, Any] = {"examples": args.examples, "bandwidth": args.bandwidth * 1e6}
    if args.fit:
        plan = find_largest_batch(config, topology, report=lambda line: print(line, file=sys.stderr), **options)
        overrides.append(f"--config.batch_size={plan.config.batch_size}")
    else:
        plan = make_plan(config, topology, **options)
    data = plan.to_json() | {"launch": launch_commands(topology, args.config, overrides)}
    print(json.dumps(data, indent=2) if args.json else format_plan(plan, data))
    return 0


def format_plan(plan: Plan, data: dict[str, Any]) -> str:
    """Returns the plan, and the same as plain data, as text for a terminal."""
    topology, chip = plan.topology, plan.topology.chip
    seconds = data["seconds"]
    lines = [
        f"{data['config'] or plan.config.model.name} on {topology.name}: {topology.size} x {chip.name}",
        _row("batch", f"{plan.config.batch_size:,} images, {plan.batch_per_chip} per chip, {data['dtype']}"),
        _row(
            "network", f"{data['parameters']:,} parameters, {data['multiply_adds'] / 1e9:.3g} G multiply-adds per image"
        ),
        _row("live", f"{data['live_parameters']:,} parameters, {data['live_multiply_adds'] / 1e9:.3g} G multiply-adds"),
        _row("run", f"{plan.steps:,} steps ({plan.config.duration} of {plan.epoch_examples:,} images)"),
        _row("FLOPs", f"{plan.flops / 1e12:.2f} TFLOP per chip and step, counted from the layers"),
    ]
    if plan.compiled:
        memory = plan.compiled.memory
        lines += [
            _row("", f"{plan.compiled.flops / 1e12:.2f} TFLOP counted by XLA, including padding"),
            _row("memory", f"{_gib(memory.total)} of {_gib(chip.hbm_bytes)} GiB per chip: {_parts(memory)}"),
            _row(
                "", f"about {data['compiled']['batch_that_fits']} images per chip would fill it (--fit verifies this)"
            ),
            _row("HBM bytes", f"{plan.compiled.bytes_accessed / 1e9:.1f} GB per chip and step, counted by XLA"),
            _row("float32", f"{_gib(plan.compiled.float32_activations)} GiB of activations are written in float32"),
            _row("compilation", f"{plan.compiled.seconds:.0f} s on this machine"),
            "collectives of a step",
            *_collectives(data["compiled"]["collectives"]),
        ]
    else:
        least, most = _gib(data["least_memory"]), _gib(chip.hbm_bytes)
        lines.append(_row("memory", f"at least {least} of {most} GiB per chip: state and activations"))
    lines += [
        _row("step", f"{_range(seconds['step'], 1e3)} ms"),
        _row("", f"arithmetic {seconds['compute'] * 1e3:.1f} ms at {chip.peak_flops / 1e12:.0f} TFLOP/s"),
        _row("", f"memory {_range(seconds['memory'], 1e3)} ms at {chip.hbm_bandwidth / 1e9:,.0f} GB/s"),
        _row(
            "", f"communication {seconds['communication'] * 1e3:.2f} ms at {topology.bandwidth / 1e9:.0f} GB/s per chip"
        ),
        _row("images/s", f"{_range(data['images_per_second'])}"),
        *_rows("input", _input(data)),
        _row("MFU", f"{_range(data['mfu'], 100)} %"),
        _row("whole run", f"{_range(data['hours'])} hours, {_range(data['chip_hours'])} chip-hours"),
        *_rows("first step", _first_step(data)),
        *_rows("checkpoint", _checkpoint(data)),
        *_rows("start with", [data["launch"][0], *(f"or  {command}" for command in data["launch"][1:])]),
        *_rows("warnings", data["warnings"]),
        "assumed",
        *(f"  {line}" for line in assumptions(plan)),
    ]
    return "\n".join(lines)


def assumptions(plan: Plan) -> list[str]:
    """Returns the assumptions behind the times, one per line."""
    slow = "all that XLA's fusions read and write goes to memory" if plan.compiled else "BatchNorm is not fused"
    lines = [
        "least: all other operations are fused into convolutions; communication overlaps with computation",
        f"most: {slow}; communication does not overlap",
        "all units run at the speed of the data sheet; input keeps up; evaluation and checkpoints take no time",
        f"data sheet: {plan.topology.chip.source}",
    ]
    if plan.config.optimizer.frozen:
        lines.insert(2, "frozen layers count as trained ones: arithmetic, memory and communication are less")
    if not plan.compiled:
        lines.insert(
            2, "not compiled: collectives and bytes are those that data parallelism requires; memory may be more"
        )
    return lines


def _input(data: dict[str, Any]) -> list[str]:
    hosts = data["hosts"]
    a_host = f"{hosts['count']} hosts with {hosts['chips']} chips" if hosts["count"] > 1 else "one host"
    return [
        f"{_range(data['cores_for_input'])} CPU cores across all hosts, at {data['images_per_core']} images/s per core",
        f"{a_host}, such as {hosts['machine']} with {hosts['vcpus'] // 2} cores: {hosts['cores']:,} in total",
    ]


def _first_step(data: dict[str, Any]) -> list[str]:
    seconds = data["first_step"]
    how = "compiling takes as long as here" if "compiled" in data else "as measured on one H200"
    return [f"after about {seconds['seconds']:.0f} s ({how}); {seconds['cached']:.0f} s with a warm compilation cache"]


def _checkpoint(data: dict[str, Any]) -> list[str]:
    checkpoint = data["checkpoint"]
    size, speed = checkpoint["bytes"] / 1e6, checkpoint["bandwidth"] / 1e6
    stop = _range(data["stop_seconds"])
    return [
        f"{size:,.0f} MB, {checkpoint['seconds']:.1f} s at {speed:,.0f} MB/s from one host, while training goes on",
        f"after SIGTERM, a step and a checkpoint take {stop} s; spot machines grant 15 to 30 s",
    ]


def _rows(name: str, texts: Sequence[str]) -> list[str]:
    return [_row(name if number == 0 else "", text) for number, text in enumerate(texts)]


def _row(name: str, text: str) -> str:
    return f"  {name:12}{text}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def _parts(memory: Memory) -> str:
    return (
        f"arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, "
        f"output {_gib(memory.output)}, of which {_gib(memory.alias)} reuse memory of arguments"
    )


def _range(pair: Sequence[float], factor: float = 1.0) -> str:
    low, high = (float(f"{value * factor:.3g}") for value in pair)
    texts = [f"{value:,.0f}" if value >= 1000 else f"{value:g}" for value in (low, high)]
    return " to ".join(dict.fromkeys(texts))


def _and_others(arrays: int) -> str:
    return f" and {arrays - 1} more" if arrays > 1 else ""


def _collectives(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each collective, largest first; beyond twelve, one line for the rest."""
    lines = [
        f"    {row['count']:4} x {row['kind']:18} {row['bytes'] / 1e6:10.3f} MB"
        f"  {row['devices']} chips  {row['layer']} ({row['direction']}){_and_others(row['arrays'])}"
        for row in rows[:12]
    ]
    if rest := rows[12:]:
        total = sum(row["count"] * row["bytes"] for row in rest)
        lines.append(f"    {sum(row['count'] for row in rest):4} x others{'':12} {total / 1e6:10.3f} MB in total")
    return lines or ["    none"]
