"""Writes the parts of the reference that the code already knows: config fields, commands and exit codes.

Each directive below is replaced by Markdown made from the tables of the package, so that the pages cannot lag behind.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, ClassVar

import flax.linen as nn
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from xception_jax import errors
from xception_jax.cli import COMMANDS
from xception_jax.command_line import Parser, field_help
from xception_jax.config import FIELDS, Section
from xception_jax.config.fields import MAX_INTEGER, Field

SCRIPT = "xception-jax"


def command_parser(name: str) -> argparse.ArgumentParser:
    """Returns the parser of a command, without that of the program around it."""
    parser = Parser(prog=f"{SCRIPT} {name}", description=COMMANDS[name])
    import_module(f"xception_jax.cli.{name}").add_arguments(parser)
    return parser


def commands() -> str:
    """Returns a section for each command: what it does, its usage, arguments and examples."""
    return "\n".join(line for name in COMMANDS for line in _command(command_parser(name), "##"))


def _command(parser: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    actions = [action for action in parser._actions if action.dest != "help"]
    subcommands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    yield from (f"{heading} {parser.prog.removeprefix(SCRIPT).strip()}", "", parser.description or "", "")
    yield from ("```text", parser.format_usage().removeprefix("usage: ").strip(), "```", "")
    if documented := [action for action in actions if action not in subcommands]:
        yield from ("| argument | meaning |", "|---|---|")
        for action in documented:
            yield f"| {_argument(action)} | {_cell((action.help or '') % _help_values(parser, action))} |"
        yield ""
    # The fields of a config have a page of their own.
    if epilog := (parser.epilog or "").replace(field_help(), "").strip():
        is_text = parser.formatter_class is argparse.RawDescriptionHelpFormatter
        yield from ("```text", epilog, "```", "") if is_text else (epilog, "")
    for action in subcommands:
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        for name, subparser in action.choices.items():
            subparser.description = subparser.description or helps.get(name)
            yield from _command(subparser, f"{heading}#")


def _argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    names = ", ".join(action.option_strings)
    values = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        values = ""
    elif isinstance(values, tuple):
        values = " ".join(values)
    return f"`{names} {values}`".replace(" `", "`")


def _help_values(parser: argparse.ArgumentParser, action: argparse.Action) -> dict[str, Any]:
    return {**vars(action), "prog": parser.prog}


def config_fields() -> str:
    """Returns a table for each section of a config: fields, defaults, accepted values, sources and descriptions."""
    sections: dict[str, list[tuple[str, Field]]] = {}
    for name, field in FIELDS.items():
        sections.setdefault(name.rpartition(".")[0], []).append((name, field))
    lines = []
    for section, fields in sections.items():
        lines += [f"## {f'`config.{section}`' if section else 'The run'}", ""]
        lines += ["| field | default | accepts | source of the default, and what the field does |", "|---|---|---|---|"]
        for name, field in fields:
            owners = f" Only for {', '.join(f'`{owner}`' for owner in field.owners)}." if field.owners else ""
            accepts = _cell(field.expects).replace(f", at most {MAX_INTEGER:,}", "")
            lines.append(
                f"| `{name.rpartition('.')[2]}` | `{field.default!r}` | {accepts}.{owners} | {_cell(field.source)} |"
            )
        lines.append("")
    return "\n".join(lines)


def exit_codes() -> str:
    """Returns a table of the exit codes of all commands."""
    rows = [
        f"| {code} | {_cell(meaning)} | {'yes' if code in errors.RESUMABLE_EXIT_CODES else ''} |"
        for code, meaning in errors.exit_code_meanings().items()
    ]
    return "\n".join(["| exit code | meaning | the same command resumes |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").split())


class Generated(SphinxDirective):
    """A directive that is replaced by generated Markdown."""

    WRITERS: ClassVar[dict[str, Callable[[], str]]] = {
        "commands": commands,
        "config-fields": config_fields,
        "exit-codes": exit_codes,
    }

    def run(self) -> list[nodes.Node]:
        """Returns the parsed Markdown."""
        return self.parse_text_to_nodes(self.WRITERS[self.name](), allow_section_headings=True)


def shorten_signature(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, ...]:
    """Writes `Array` for JAX's internal name of it, and leaves out the parameters that every module or section has."""
    if inspect.isclass(documented) and issubclass(documented, Section):
        return "", None  # its fields are listed in the table
    if signature and inspect.isclass(documented) and issubclass(documented, nn.Module):
        signature = re.sub(r"(, )?parent: .*(?=\)$)", "", signature)
    return tuple(text and text.replace("jaxlib._jax.", "") for text in (signature, returned))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directives with Sphinx."""
    for name in Generated.WRITERS:
        app.add_directive(name, Generated)
    app.connect("autodoc-process-signature", shorten_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
