"""`xception-jax study`: runs and reports studies, and measures the separability of kernels and of images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_jax.command_line import at_least
from xception_jax.config.shipped import shipped_names
from xception_jax.errors import ConfigError, InputMissingError, UsageError
from xception_jax.files import expanded, local_directory
from xception_jax.logs.console import say
from xception_jax.names import command_line, printable_path
from xception_jax.storage import names_object_store
from xception_jax.study.study_file import as_study, run_study_file
from xception_jax.user_files import require_directory, write_output
from xception_jax.weights.sources import require_known

if TYPE_CHECKING:
    from xception_jax.study.dial.design import DialStudy
    from xception_jax.study.kernels.claims import Verdicts

EXAMPLES = """\
examples:
  xception-jax study run studies/spectrum --print
  xception-jax study run studies/spectrum --workdir runs/spectrum --jobs 2
  xception-jax study run studies/spectrum:cifar,multiply_adds --workdir W --slurm spectrum.sh
  xception-jax study report runs/spectrum
  xception-jax study power runs/pilot --margin 0.003
  xception-jax study kernels runs/kernels
  xception-jax study kernels vgg16.safetensors
  xception-jax study kernels runs/dial
  xception-jax study separability photos/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Compares networks over seeds, at equal cost, with hypotheses stated beforehand."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="run | report | power | kernels | separability"
    )

    for add in (_add_run, _add_report, _add_power, _add_kernels, _add_separability):
        add(actions)


def _add_run(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("run", help="train all cells (arm x seed); the same command resumes")
    parser.add_argument(
        "study",
        help=f"{', '.join(shipped_names('study'))}, or your own .py file; optionally with ':size' or ':size,control'",
    )
    parser.add_argument("--workdir", help="the study directory")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="number of cells that run at a time; they share cores and GPUs evenly",
    )
    parser.add_argument(
        "--data_dir", help="directory of the datasets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    parser.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="DIR",
        help="another study directory whose finished cells are copied where the config is equal; may be repeated",
    )
    parser.add_argument(
        "--cell", type=at_least(0), metavar="N", help="run only cell N, as each job of a job array does"
    )
    parser.add_argument("--slurm", metavar="FILE", help="write a Slurm array script instead of running")
    parser.add_argument("--print", action="store_true", help="print the arms and their costs without training")


def _add_report(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("report", help="write the report, the figures and cells.csv; also while the study runs")
    parser.add_argument("workdir", help="the study directory")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_power(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("power", help="plan how many seeds decide the margin, from the variance of a pilot")
    parser.add_argument("source", metavar="FILE", help="study directory of the pilot, or a cells.csv")
    parser.add_argument(
        "--margin", type=_margin, help="the smallest difference that matters, as a share (default: that of the study)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def _add_kernels(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("kernels", help="measure how separable the kernels of regular convolutions are")
    parser.add_argument(
        "source", help="work directory of a run, study directory (also of a dial study), or weight file of any network"
    )
    parser.add_argument(
        "--axes",
        choices=("hwio", "oihw", "ohwi"),  # weight_file.AXES, whose package imports JAX
        help="order of the axes of a kernel in a weight file, where i is input and o is output (default: inferred)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="of a run: replace regular kernels by kernels of low rank, and print the accuracy lost on the test split",
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="directory of the datasets for --replace (default: that of the run)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_separability(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "separability", help="measure how separable the patches of images are into channels and space"
    )
    parser.add_argument("source", help="folder of images, at any depth, or directory or name of a prepared dataset")
    parser.add_argument("--split", default="train", help="split of a prepared dataset (default: %(default)s)")
    parser.add_argument(
        "--patches", type=at_least(100), default=28_000, help="number of patches that are read (default: %(default)s)"
    )
    parser.add_argument(
        "--side",
        type=int,
        choices=range(2, 12),  # a covariance has side^4 x channels^2 elements
        metavar="2..11",
        default=3,
        help="side of a patch in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="seed for the positions of patches and the turns (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs one of the actions.

    Raises:
      UserError: see the functions that it calls.
    """
    environment = dict(os.environ)  # of the cells
    if not getattr(args, "replace", False):
        os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerators to the cells
    if args.action == "run":
        return _run(args, environment)
    if args.action == "report":
        _require_directory(args.workdir)
        root = local_directory(args.workdir, "workdir")
        from xception_jax.study.dial.records import is_dial

        if is_dial(root):
            return _report_dial(root, args.json)
        from xception_jax.study.report import format_results, write_study_report

        results = write_study_report(root)
        print(json.dumps(results.to_json(), indent=1) if args.json else format_results(results))
        return 0
    if args.action == "power":
        return _power(args)
    if args.action == "separability":
        from xception_jax.study.patch_covariance import format_patches, measure_patches

        found = measure_patches(args.source, split=args.split, patches=args.patches, side=args.side, seed=args.seed)
        print(json.dumps(found.to_json(), indent=1) if args.json else format_patches(found))
        return 0
    return _kernels(args)


def _margin(text: str) -> float:
    """Returns a margin from the command line.

    Raises:
      ArgumentTypeError: it is not between 0 and 1.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1; 0.005 is half a percentage point")
    return value


def _power(args: argparse.Namespace) -> int:
    if not os.path.exists(args.source):
        fix = "name the --workdir of `xception-jax study run`, or a cells.csv that `study report` wrote"
        raise InputMissingError("there is no such file or directory", args.source, fix)
    from xception_jax.study.power import format_plan, plan_seeds

    plan = plan_seeds(Path(args.source), args.margin)
    print(json.dumps(plan.to_json(), indent=1) if args.json else format_plan(plan))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    require_known(args.source)
    if args.replace:
        return _replace_kernels(args)
    if args.data_dir is not None:
        raise UsageError("--data_dir is only for --replace", "--data_dir", "remove it, or add --replace")
    if args.axes and (os.path.isdir(args.source) or names_object_store(args.source)):
        raise UsageError("--axes is only for weight files", "--axes", "remove it: the axes of a run are known")
    from xception_jax.study.dial.records import is_dial
    from xception_jax.study.kernels.claims import format_verdicts, judge_calibration, judge_labels
    from xception_jax.study.kernels.networks import analyse
    from xception_jax.study.kernels.table import format_calibration, format_kernels
    from xception_jax.study.store import STUDY, read_study

    root = Path(args.source)
    verdicts: Verdicts | None
    if is_dial(root):
        from xception_jax.study.kernels.calibration import calibrate, write_calibration_figures

        found = calibrate(root)
        figures = [str(path) for path in write_calibration_figures(found)]
        data, text, verdicts = found.to_json(), format_calibration(found), judge_calibration(found)
        text += "".join(f"\nfigure: {printable_path(path)}" for path in figures)
    else:
        report = analyse(args.source, args.axes)
        data, text = report.to_json(), format_kernels(report)
        verdicts = judge_labels(read_study(root), report) if (root / STUDY).exists() else None
    if verdicts is not None:
        data, text = data | verdicts.to_json(), f"{text}\n{format_verdicts(verdicts)}"
    print(json.dumps(data, indent=1) if args.json else text)
    return 0


def _replace_kernels(args: argparse.Namespace) -> int:
    if args.axes:
        raise UsageError("--axes does not work with --replace", "--axes", "remove --axes")
    if not names_object_store(args.source) and not os.path.exists(os.path.join(args.source, "config.json")):
        fix = "name the work directory of a run; of a study, that of one of its cells: cells/ARM/seed0"
        raise UsageError("--replace needs a run", args.source, fix)
    from xception_jax.study.kernels.replacement import format_replacements, replace_kernels

    found = replace_kernels(args.source, args.data_dir)
    print(json.dumps(found.to_json(), indent=1) if args.json else format_replacements(found))
    return 0


def _require_directory(workdir: str) -> None:
    """Raises InputMissingError if a study directory is missing. Answers before JAX is imported."""
    if not os.path.isdir(workdir):
        fix = "name the --workdir of `xception-jax study run`"
        raise InputMissingError("there is no such directory", workdir, fix)


def _run(args: argparse.Namespace, environment: dict[str, str]) -> int:
    if args.data_dir is not None:
        environment["TFDS_DATA_DIR"] = os.environ["TFDS_DATA_DIR"] = str(
            expanded(args.data_dir, "--data_dir").absolute()
        )
    if args.workdir is None and not args.print:
        raise UsageError("--workdir is missing", "the command line", "add --workdir=DIRECTORY")
    if args.reuse and (args.cell is not None or args.slurm is not None):
        fix = "remove --reuse, or first copy the cells by `study run --reuse` without these options"
        raise UsageError("--reuse does not work with --cell or --slurm", "--reuse", fix)
    if args.retry and (args.cell is not None or args.slurm is not None):
        fix = "remove --retry, or run the failed cells by `study run --retry` without these options"
        raise UsageError("--retry does not work with --cell or --slurm", "--retry", fix)
    if (args.print, args.cell is not None, args.slurm is not None).count(True) > 1:
        raise UsageError("--print, --cell and --slurm exclude each other", "the command line", "keep one of them")
    if args.slurm is not None:
        require_directory(args.slurm)
    study = None
    if args.cell is None:
        described, path = run_study_file(args.study)
        from xception_jax.study.dial.design import DialStudy  # imports JAX, which a missing file need not wait for

        if isinstance(described, DialStudy):
            return _run_dial(args, described, path, environment)
        study = as_study(described, path)
    for directory in args.reuse:
        _require_directory(directory)
    from xception_jax.study.execute import check_datasets, list_cells, run_cell, run_study, slurm_script
    from xception_jax.study.store import STUDY, open_study, read_study

    if study is None:
        return run_cell(local_directory(args.workdir, "--workdir"), args.cell, environment)
    reuse = [read_study(Path(directory)) for directory in args.reuse]
    if args.print:
        print(list_cells(study))
        return 0
    root = local_directory(args.workdir, "--workdir")
    if args.slurm is None and not (root / STUDY).exists():  # the jobs of a cluster may see other directories
        check_datasets(study)  # before a minute of solving for the widths
    with open_study(root, study, say) as stored:
        if args.slurm is not None:
            words = [sys.executable, "-m", "xception_jax", "study", "run", args.study]
            words += [f"--data_dir={args.data_dir}"] if args.data_dir else []
            command = command_line(words)
            write_output("job script", args.slurm, slurm_script(stored, command, args.jobs))
            print(f"wrote {printable_path(args.slurm)}; its first lines say how to submit it")
            return 0
        return run_study(stored, environment, jobs=args.jobs, retry=args.retry, reuse=reuse)


# Options of `study run` that mean nothing for a dial study, and the values that they have if they are not given.
_NOT_FOR_DIAL: dict[str, Any] = {"--reuse": [], "--slurm": None, "--retry": False}


def _run_dial(args: argparse.Namespace, study: DialStudy, path: str, environment: dict[str, str]) -> int:
    """Runs a dial study, on the accelerator if there is one."""
    for option, default in _NOT_FOR_DIAL.items():
        if getattr(args, option.removeprefix("--")) != default:
            what = f"{option} does not work with this study, whose cells are trained by one command"
            raise UsageError(what, option, f"remove {option}")
    from xception_jax.study.dial.claims import unknown_claims
    from xception_jax.study.dial.design import check_dial
    from xception_jax.study.dial.execute import list_dial, run_dial

    study = check_dial(study, path)
    if unknown := unknown_claims(study):
        what = f"no test of this version belongs to the claims {', '.join(unknown)} as they are worded"
        raise ConfigError(what, path, "state claims of xception_jax/study/dial/claims.py, or none")
    if args.print:
        print(list_dial(study))
        return 0
    import jax

    # The file of the study has imported JAX, which read the variable that `run` had set.
    jax.config.update("jax_platforms", environment.get("JAX_PLATFORMS"))
    return run_dial(study, local_directory(args.workdir, "--workdir"), jobs=args.jobs)


def _report_dial(root: Path, as_json: bool) -> int:
    from xception_jax.study.dial.report import format_dial, write_dial_report

    report = write_dial_report(root)
    print(json.dumps(report.to_json(), indent=1) if as_json else format_dial(report))
    return 0
