"""The documentation is true: its commands are accepted, its Python runs, and its links lead somewhere.

Python blocks run, one page after the other in a directory with a trained network and two pictures, unless the comment
`<!-- not run: REASON -->` stands before them. Shell blocks are checked argument by argument; those after `<!-- run -->`
are also run. A block after `<!-- file: NAME -->` is written to that file, for later blocks of its page.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from tests.conftest import ROOT
from xception_jax.cli import COMMANDS, main
from xception_jax.command_line import read_config, split_overrides
from xception_jax.config import FIELDS, resolve
from xception_jax.config.shipped import find_config, shipped_names

DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_extensions"))
reference_pages = import_module("reference_pages")  # the Sphinx extension that generates the reference

GENERATED = ("data/", "_build/", "benchmarks.md", "without_amx/")  # by programs
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in DOCS.rglob("*.md") if not str(p.relative_to(DOCS)).startswith(GENERATED)),
]
SHELL = ("bash", "sh", "console")
TRAINS = DOCS / "howto" / "train.md"
NOTEBOOK = DOCS / "tutorials" / "quickstart.ipynb"


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page: Path, languages: tuple[str, ...]) -> Iterator[tuple[Token, str]]:
    """Yields (block, comment before it)."""
    previous = None
    for token in tokens(page):
        if token.type == "fence" and token.info.strip() in languages:
            comment = re.fullmatch(r"<!--\s*(.*?)\s*-->", previous.content.strip()) if previous else None
            yield token, comment[1] if comment else ""
        previous = token


def commands(shell: str) -> Iterator[list[str]]:
    """Yields the words of each command; of a block with output, only those after a prompt."""
    lines = shell.replace("\\\n", " ").splitlines()
    prompts = [line for line in lines if line.startswith("$ ")]
    for line in prompts or lines:
        yield shlex.split(line.removeprefix("$ "), comments=True)


def program_arguments(words: list[str]) -> list[str] | None:
    """Returns the arguments of xception-jax, or None if the command is another program."""
    spellings = (["xception-jax"], ["python", "-m", "xception_jax"])
    return next((words[len(start) :] for start in spellings if words[: len(start)] == start), None)


def check_arguments(arguments: list[str], *, with_values: bool) -> None:
    """Raises an error if the program would refuse the arguments.

    Args:
      arguments: of xception-jax.
      with_values: whether to check the values of fields; a placeholder such as N is no valid one.
    """
    if {"--help", "--version"} & set(arguments):
        return
    arguments, overrides = split_overrides(arguments)
    assert arguments[0] in COMMANDS, arguments[0]
    args = reference_pages.command_parser(arguments[0]).parse_args(arguments[1:])
    for override in overrides:
        assert re.match(r"--(?:no)?config\.([\w.]+)", override)[1] in FIELDS, override
    if overrides:
        assert "config" in args
    if getattr(args, "study", None) and not args.study.endswith(".py"):
        find_config(args.study, "study")
    config = getattr(args, "config", None)
    if with_values and config and config.partition(":")[0] in shipped_names():
        resolve(read_config(config, overrides))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block, _ in blocks(page, SHELL):
        for words in commands(block.content):
            if (arguments := program_arguments(words)) is not None:
                check_arguments(arguments, with_values=True)
            elif words[:1] == ["make"]:
                assert words[1] in targets, words
    in_text = (child for token in tokens(page) for child in token.children or () if child.type == "code_inline")
    for code in in_text:
        arguments = program_arguments(code.content.split())
        # Without options it is a name in a sentence; brackets and dots are those of a synopsis.
        if arguments and re.search(r" --(?!help)", code.content) and not re.search(r"\[|\.\.\.|COMMAND", code.content):
            check_arguments(program_arguments(shlex.split(code.content)), with_values=False)


def run_page(page: Path) -> None:
    """Runs the blocks of a page in order, as the docstring of this file says."""
    namespace: dict = {}
    for token, comment in blocks(page, ("python", *SHELL)):
        if token.info.strip() != "python":
            for words in commands(token.content) if comment == "run" else ():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["xception-jax", *program_arguments(words)])
                    assert main() == 0
            continue
        code = compile(token.content, f"{page}:{token.map[0] + 1}", "exec")
        if comment.startswith("file: "):
            Path(comment.removeprefix("file: ")).write_text(token.content)
        elif not comment.startswith("not run: "):
            exec(code, namespace)


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared_environment) -> Iterator[Path]:
    """Enters a directory with what the snippets take for granted: the network of the page TRAINS and two pictures."""
    place = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", shared_environment["TFDS_DATA_DIR"])
        patch.syspath_prepend(str(place))
        patch.chdir(place)
        picture = Image.open(DOCS / "images" / "contact_sheet.png").convert("RGB")
        picture.crop((0, 0, 90, 80)).save("photo.jpg")
        for name in ("garment.png", "shirt.png"):
            picture.crop((0, 0, 60, 90)).save(name)
        run_page(TRAINS)
        Path("runs/first").symlink_to("from_python")
        yield place


SLOW = ("your_network", "explain")
WITH_CODE = [page for page in PAGES if page != TRAINS and any(True for _ in blocks(page, ("python", *SHELL)))]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else []) for page in WITH_CODE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_snippets_run(page, place):
    run_page(page)


def slug(heading: str) -> str:
    """Returns the anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found = tokens(page)
    return {slug(text.content) for opening, text in itertools.pairwise(found) if opening.type == "heading_open"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    children = [child for token in tokens(page) for child in token.children or ()]
    links = [
        child.attrGet("href") or child.attrGet("src") for child in children if child.type in ("link_open", "image")
    ]
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        candidates = [target, *(target.with_name(f"{target.name}{suffix}") for suffix in (".md", ".ipynb"))]
        found = [candidate for candidate in candidates if candidate.exists()]
        assert found, f"{link} is missing"
        assert not anchor or anchor in anchors(found[0]), f"{link} has no such heading"


def test_code_names_pages_that_exist():
    """Messages, docstrings and comments name pages of docs/."""
    for folder in ("xception_jax", "configs", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"(?<![\w/.])docs/[\w/]+\.(?:md|csv|json)", path.read_text()):
                assert (ROOT / name).exists(), f"{path} names {name}"


def test_the_reference_has_every_field_command_and_exit_code():
    fields, named = reference_pages.config_fields(), reference_pages.commands()
    sections = re.split(r"^## (?:The run|`config\.(\S+)`)$", fields, flags=re.MULTILINE)
    found = {section or "": text for section, text in zip(sections[1::2], sections[2::2], strict=True)}
    for section, _, field in (name.rpartition(".") for name in FIELDS):
        assert f"| `{field}` |" in found[section]
    assert all(f"## {name}\n" in named for name in COMMANDS)
    assert "### study run\n" in named
    assert re.search(r"\| 75 \| The run was asked to stop,.*\| yes \|", reference_pages.exit_codes())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter
def test_the_notebook_runs(tmp_path, shared_environment):
    import nbclient
    import nbformat

    notebook = nbformat.reads(NOTEBOOK.read_text(), as_version=4)
    tags = [set(cell.metadata.get("tags", ())) for cell in notebook.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs of the notebook"
    (parameters,) = [cell for cell, names in zip(notebook.cells, tags, strict=True) if "parameters" in names]
    parameters.source += '\nduration, train_split, eval_split, test_split = "1 epoch", "train[:128]", "", "test[:20]"'
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=shared_environment)
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
