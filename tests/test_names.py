"""Names are data: one table of nasty names goes through every output, and none of them does anything there."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import logging
import os
import pickle
import re
import subprocess
import unicodedata
import warnings
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from markdown_it import MarkdownIt
from PIL import Image

from tests.conftest import run_command as run
from tests.data.small_imagenet import photographs
from tests.evaluation.conftest import compiled_once  # noqa: F401
from tests.models.random_weights import random_variables
from tests.study.simulated import small_study, write_simulated
from xception_jax import command_line, environment, names
from xception_jax.cli import embed, evaluate, explain, predict
from xception_jax.config import default_config, override, resolve, resolve_model
from xception_jax.data.datasets import open_dataset
from xception_jax.data.prepare.image_folder import Contents, Skipped
from xception_jax.data.prepare.writer import Dataset, write_dataset
from xception_jax.errors import BadDataError, InputMissingError, PreemptedError, UserError
from xception_jax.evaluation import judgement_text, tables
from xception_jax.evaluation.contact_sheet import Tile, draw
from xception_jax.evaluation.features import load_features
from xception_jax.export.card import as_markdown, make_card
from xception_jax.export.check import check_sha256, checksum_line
from xception_jax.export.formats import loading_code
from xception_jax.logs import console
from xception_jax.metrics.judgement import choose_thresholds, judge
from xception_jax.metrics.predictions import Predictions, mistakes
from xception_jax.models import create_model
from xception_jax.reports.mistakes import choose_cells, choose_examples
from xception_jax.reports.run import Judged, write_report
from xception_jax.study.execute import list_cells, slurm_script
from xception_jax.study.progress_table import ProgressTable
from xception_jax.study.report import format_results, write_study_report
from xception_jax.study.runner import Runner
from xception_jax.training.fingerprint import compare_signatures
from xception_jax.weights import Network, Preprocessing, load_network, save_network
from xception_jax.weights.parse import parse_file

NASTY = [
    "x\nerror: forged\n  where: forged\n  fix:   forged",
    "\n  fix:   forged",
    "\rerror: forged",
    "\x1b[2J\x1b]0;forged\x07",
    "\x9b31mred",
    "abc\u202egnp.exe\u2066",
    "a\u200bb\u200d\ufe0f\u3164",
    "line\u2028separator\x85next",
    "Zalgo" + "\u0301" * 50,
    '=HYPERLINK("http://x")',
    "+1+cmd",
    "-2+3",
    "@SUM(1)",
    "\t=1+1",
    " =1+1",
    "\uff1d1+1",
    "a;=1+1",
    "[a](javascript:x)",
    "![](http://x/y.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<http://x> http://x www.x.org a@b.org",
    "`code` ``more``",
    "a|b|c",
    "# heading",
    "- item",
    "&lt;b&gt; &#60;",
    "{{ 7*7 }} {% raw %}",
    "%s{}%(x)s{0}",
    "$(rm -rf /tmp/x)",
    "'; ls",
    '"`ls`"\\',
    "$x^2$ $\\frac$",
    "_hidden",
    "\udcff\udc80",
    "\ud800",
    "x" * 10_000,
    "\u65e5\u672c\u8a9e \u00e9 \u05e9\u05dc\u05d5\u05dd",
    "",
    "   ",
    "-rf",
    "..",
    "a\0b",
    "42",
    "-3.5e2",
    "-inf",
    "+1_0",
    "=ls",
    "a\\b\nc",
    "a\\|b",
]
# Bytes of file names, which have no slash, no NUL and at most 255 bytes.
FILES = [os.fsencode(name) for name in NASTY if "/" not in name and "\0" not in name and "\ud800" not in name]
FILES = [name for name in FILES if 0 < len(name) < 200 and name not in (b"..",)] + [b"y" * 240, b"\xff\xfe\xe9"]
FORGED = re.compile(r"^(error:|  where:|  fix:|warning:|note:)")


def is_hidden(character: str) -> bool:
    """Says what a terminal obeys or does not show, independently of `names`."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\ufe0f\u3164"


def check_text(text: str, *, forged: int = 0) -> None:
    """Fails if a text holds a raw control character, or more than `forged` lines like those of an error."""
    assert not [character for character in text if is_hidden(character) and character != "\n"]
    assert sum(bool(FORGED.match(line)) for line in text.split("\n")) == forged
    assert "\u0301" * 10 not in text
    text.encode()


@pytest.mark.parametrize("name", NASTY)
def test_a_shown_name_is_one_visible_line(name):
    shown = names.printable(name)
    assert "\n" not in shown
    check_text(shown)
    assert len(shown) <= names.NAME_LENGTH
    assert names.printable(shown) == shown
    assert names.printable("caf\u00e9 \u65e5\u672c a\u00a0b \ue000") == "caf\u00e9 \u65e5\u672c a\u00a0b \ue000"


def test_escapes_are_those_of_python():
    assert names.printable("a\nb\tc\x1b\x9b\u202e\udcff\U000e0041") == r"a\nb\tc\x1b\x9b\u202e\xff\U000e0041"
    assert names.printable("a" * 150 + "b" * 150, 100) == "a" * 66 + "\u2026" + "b" * 33
    assert names.printable_lines("one\nerror: two\x1b") == "one\n    error: two\\x1b"


@pytest.mark.parametrize("name", NASTY)
def test_an_error_has_three_lines_whatever_it_names(name):
    for error in (UserError, PreemptedError):
        text = str(error(f"{name} is wrong", name, f"remove {name}"))
        lines = text.split("\n")
        assert len(lines) == 3
        assert max(map(len, lines)) <= names.LINE_LENGTH + len("  where: ")
        check_text(text, forged=3 if error is UserError else 1)
    table = UserError("tensors differ", "x", "y", compare_signatures({name: "float32[1]"}, {})[1])
    assert str(table).split("\n")[2].split() == ["parameter", "stored", "wanted"]
    assert len(str(table).split("\n")) == 5
    check_text(str(table), forged=3)
    assert str(pickle.loads(pickle.dumps(table))) == str(table)
    check_text(str(UserError("x", "y", "z", [name, name])), forged=3)


@pytest.mark.parametrize("name", NASTY)
def test_a_cell_is_no_formula(name):
    cell = names.csv_cell(name)
    check_text(cell)
    parts = [part.strip() for part in cell.split(";")]
    assert cell in ("42", "-3.5e2") or not any(part.startswith(tuple("=+-@\uff1d\t\r")) for part in parts)
    assert [names.csv_cell(value) for value in (-1, -1.5, None, True, "-3.5e2")] == [-1, -1.5, None, True, "-3.5e2"]


def markdown_problems(text: str) -> list[str]:
    """Returns the types of the tokens of links, images and HTML in a text."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    found = [child.type for token in tokens for child in (token, *(token.children or ()))]
    return [kind for kind in found if kind.startswith(("link", "image", "html"))]


def test_markdown_has_no_markup_of_a_name():
    assert markdown_problems("[a](b) ![c](d) <b>x</b>")  # the check finds what it should
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    for name in NASTY:
        for text in (f"# {names.in_markdown(name)}", f"- x {names.in_markdown(name)}", names.in_markdown(name)):
            assert markdown_problems(text) == []
            spans = [child for token in parser.parse(text) for child in token.children or () if child.type != "text"]
            assert [span.type for span in spans] == ["code_inline"]
        table = f"| a | b |\n|---|---|\n| {names.in_markdown(name)} | end |"
        cells = [token.content for token in parser.parse(table) if token.type == "inline"]
        assert len(cells) == 4
        assert cells[3] == "end"
        assert (
            cells[2].strip("` ") == names.printable(name, names.LINE_LENGTH).replace("|", r"\x7c").strip("` ")
            or not name
        )


def test_a_shell_gives_the_argument_back(tmp_path):
    passed = [name for name in NASTY if "\0" not in name and "\ud800" not in name]
    script = "printf '%s\\0' " + names.command_line(passed)
    check_text(script)
    for shell in (["bash", "-c", script], ["bash", "--posix", "-c", script]):
        found = subprocess.run(shell, capture_output=True, check=True, cwd=tmp_path).stdout
        assert found.split(b"\0")[:-1] == list(map(os.fsencode, passed))
    assert names.in_shell(Path("-rf")) == "./-rf"
    assert names.in_shell("=ls") == "'=ls'"
    check_text(names.in_shell("\ud800\0"))
    assert list(tmp_path.iterdir()) == []


def test_advice_can_be_pasted(tmp_path, monkeypatch):
    odd = tmp_path / "it's $(touch x)\n\udcff"
    odd.mkdir()
    with pytest.raises(InputMissingError) as raised:
        open_dataset(
            override(resolve(default_config()), {"data.name": "none", "data.data_dir": str(odd)}).data, "train"
        )
    assert raised.value.fix.endswith(names.in_shell(odd))
    (odd / "weights.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(BadDataError) as raised:
        parse_file(odd / "weights.pt")
    command = raised.value.fix.partition(": ")[2]
    printed = subprocess.run(
        ["bash", "-c", command.replace("python", "printf '%s\\0'", 1)], capture_output=True, check=True, cwd=tmp_path
    )
    assert printed.stdout.split(b"\0")[2] == os.fsencode(odd / "weights.pt")
    check_text(str(raised.value), forged=3)
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py", str(odd)])
    check_text(environment.command())


def test_logs_and_messages_stay_on_their_lines(capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [caplog.handler])  # without those of libraries, which write to stderr
    factory, formatting = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        command_line._protect_output()
        for name in NASTY:
            console.say(f"starts from {name}")
            logging.getLogger("names").warning("%s: removed", name)
            check_text(warnings.formatwarning(UserWarning(name), UserWarning, "x.py", 1))
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatting
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(NASTY)
    check_text("\n".join(lines))
    check_text("\n".join(caplog.messages))
    assert len(caplog.messages) == len(NASTY)


@pytest.fixture(scope="module")
def network() -> Network:
    model = resolve_model({"width_multiplier": 0.05, "middle_blocks": 0, "num_classes": len(NASTY)})
    variables = jax.tree.map(np.array, random_variables(create_model(model), np.zeros((1, 71, 71, 3), np.float32)))
    return Network(model, variables, Preprocessing(71), tuple(NASTY), "a\nsource", "")


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_network(path, network)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images under every name that a file can have, one of them damaged, in a folder that is no UTF-8 either."""
    directory = tmp_path_factory.mktemp("photos") / os.fsdecode(b"fol\xffder\nerror: forged")
    directory.mkdir()
    content = io.BytesIO()
    Image.fromarray(photographs()[0]).save(content, "PNG")
    for number, name in enumerate(FILES):
        path = os.fsencode(directory) + b"/" + name + b".png"
        with open(path, "wb") as file:
            file.write(b"\x89PNG" if number == 0 else content.getvalue())
    return directory


def test_class_names_survive_a_weight_file(weights):
    assert load_network(weights).classes == tuple(NASTY)


def test_predict_shows_files_and_classes(weights, folder, tmp_path, capsys):
    sheet = tmp_path / os.fsdecode(b"sheet\xff.png")
    with pytest.raises(BadDataError) as raised:
        run(predict, "--weights", weights, folder, "--top", len(NASTY), "--contact_sheet", sheet)
    out, err = capsys.readouterr()
    check_text(out)
    check_text(err)
    check_text(str(raised.value), forged=3)
    assert len(out.split("\n")) == (len(FILES) - 1) * (1 + len(NASTY)) + 1
    assert r"fol\xffder\nerror: forged/\xff\xfe\xe9.png" in out
    with Image.open(sheet) as drawn:
        assert drawn.size[0] > 500
    with pytest.raises(BadDataError):
        run(predict, "--weights", weights, folder, "--json")
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {os.fsencode(entry["file"]) for entry in entries} == {
        os.fsencode(folder) + b"/" + name + b".png" for name in FILES
    }


def test_explain_draws_under_names_that_a_disk_takes(weights, folder, tmp_path, capsys):
    chosen = [os.fsdecode(os.fsencode(folder) + b"/" + name + b".png") for name in (*FILES[:3], *FILES[-4:])]
    maps = tmp_path / "maps"
    with pytest.raises(BadDataError):
        run(explain, "--weights", weights, *chosen, "--out", maps, "--npz", tmp_path / "maps.npz", "--class", 0)
    out, err = capsys.readouterr()
    check_text(out)
    check_text(err)
    assert len(out.split("\n")) == len(chosen)
    written = [path.name for path in maps.iterdir()]
    assert len(written) == len(chosen) - 1
    check_text("".join(written))
    with np.load(tmp_path / "maps.npz") as saved:
        assert saved["path"].tolist() == chosen[1:]
    with pytest.raises(BadDataError):
        run(explain, "--weights", weights, *chosen, "--out", tmp_path / "sheet.png", "--json")
    for line in capsys.readouterr().out.splitlines():
        json.loads(line)


def test_names_below_images_are_drawn_as_they_are_written():
    image = np.zeros((8, 8, 3), np.uint8)
    for chosen in (NASTY[:8], ["$x^2$ $\\frac$", "\udcff", "x" * 10_000, "", "a\0b", "_hidden"]):
        with Image.open(io.BytesIO(draw([Tile(image, name, name, 0.5) for name in chosen]))) as sheet:
            assert sheet.size[1] < 1500


def test_embed_writes_tables_without_formulas(weights, folder, tmp_path, capsys):
    for suffix in ("csv", "npz"):
        with pytest.raises(BadDataError):
            run(embed, "--weights", weights, folder, "--labels", "folder", "--out", tmp_path / f"f.{suffix}")
    check_text(capsys.readouterr().err)
    with open(tmp_path / "f.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(FILES) - 1
    for row in rows:
        check_text(row["path"])
        assert row["label"] == r"fol\xffder\nerror: forged"
        assert np.isfinite(float(row["f0"]))
    assert len(load_features(tmp_path / "f.npz").path) == len(FILES) - 1


@pytest.fixture(scope="module")
def predictions() -> Predictions:
    """Every image is a mistake, so that every name is shown as a label and as a prediction."""
    count = len(NASTY)
    scores = np.random.default_rng(0).dirichlet(np.full(count, 0.1), 2 * count).astype(np.float32)
    classes = np.argsort(-scores, axis=1)
    return Predictions(
        np.arange(2 * count),
        (classes[:, 0] + 1) % count,
        classes[:, :5].astype(np.int32),
        np.take_along_axis(scores, classes, axis=1)[:, :5],
        all_probabilities=scores,
        file_name=np.array([*NASTY, *NASTY]),
        group=np.array([*NASTY, *NASTY]),
    )


def test_tables_of_an_evaluation(predictions, tmp_path):
    thresholds = choose_thresholds(predictions)
    judgement = judge(predictions, len(NASTY), thresholds, draws=5)
    wrong = mistakes(predictions, NASTY)
    shown = judgement_text.MOST_CLASSES
    text = judgement_text.as_text(judgement, NASTY, wrong, "a\nerror: split")
    check_text(text)
    assert len(text.split("\n")) < 5 * shown
    header = {"source": "a\nerror: x", "count": 1, "dataset": "a\nerror: x", "split": "\x1b"}
    check_text(tables.as_text(header, [""], []))
    tables.write_csv(str(tmp_path / "classes.csv"), tables.class_rows(predictions, judgement, NASTY))
    tables.write_csv(str(tmp_path / "mistakes.csv"), wrong, tables.MISTAKES_FIELDS)
    for path in tmp_path.iterdir():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) >= len(NASTY)
        for row in rows:
            for name in row.keys() & {"name", "confused_with", "file", "group", "label", "predicted"}:
                check_text(row[name])
                assert row[name] == names.csv_cell(row[name]), (path, name)
            for name in row.keys() & {"class", "images", "index", "probability", "threshold"}:
                float(row[name])


def test_evaluate_names_mistakes_by_file(weights, tmp_path, capsys):
    content = io.BytesIO()
    Image.fromarray(photographs()[0]).save(content, "PNG")
    files = [*FILES, b"a\xc3\xa9\0"]
    example = {"image": content.getvalue(), "label": 0}
    dataset = Dataset(
        "odd_names",
        tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=[f"c{number}" for number in range(len(NASTY))]),
                "file_name": tfds.features.Text(),
            }
        ),
        {"test": [(str(number), example | {"file_name": name}) for number, name in enumerate(files)]},
        "Files under any name.",
    )
    write_dataset(dataset, tmp_path / "tfds", progress=False)
    where = ["--dataset", "odd_names", "--split", "test", "--data_dir", tmp_path / "tfds"]
    table, saved = tmp_path / "mistakes.csv", tmp_path / "p.npz"
    run(evaluate, weights, *where, "--mistakes", table, "--predictions", saved, "--per_class", tmp_path / "classes.csv")
    out, err = capsys.readouterr()
    check_text(out)
    check_text(err)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {names.csv_cell(os.fsdecode(name).rstrip("\0")) for name in files}


class Page(html.parser.HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def check_page(text: str) -> None:
    assert not [character for character in text if is_hidden(character) and character != "\n"]
    page = Page(text)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [
        value
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href") and not str(value).startswith(("#", "data:image/"))
    ]


def test_the_report_of_a_run(predictions, tmp_path):
    config = override(resolve(default_config()), {"name": NASTY[0], "model.num_classes": len(NASTY)})
    shown = {index for group in choose_examples(predictions) for index in group}
    shown |= {index for cell in choose_cells(predictions, len(NASTY)).values() for index in cell}
    pixels = {index: np.zeros((8, 8, 3), np.uint8) for index in shown}
    judgement = judge(predictions, len(NASTY), choose_thresholds(predictions), draws=5)
    judged = Judged("test\x1b", predictions, judgement, pixels)
    info = {"command": "train '\u202e\udcff'", "devices": "\x1b"}
    metrics = [{"step": 1, "split": "train", "loss": 1.0}]
    path = write_report(tmp_path, config=config, metrics=metrics, info=info, judged=judged, class_names=NASTY)
    text = path.read_text(encoding="utf-8")
    check_page(text)
    assert "x" * names.PATH_LENGTH not in text
    assert max(map(len, re.findall(">(x+…x+)<", text))) == names.PATH_LENGTH
    assert {len(name) for name in re.findall(">(x+…x+)</(?:td|b)>", text)} == {names.NAME_LENGTH}


def test_a_confusion_matrix_and_legends(tmp_path):
    some = ["_hidden", "$x^2$ $\\frac$", "<script>alert(1)</script>", "x\n\x1b", "\udcff"]
    label = np.arange(40) % len(some)
    scores = np.random.default_rng(0).dirichlet(np.ones(len(some)), 40).astype(np.float32)
    classes = np.argsort(-scores, axis=1)
    best = np.take_along_axis(scores, classes, axis=1)
    found = Predictions(np.arange(40), label, classes.astype(np.int32), best, all_probabilities=scores)
    config = override(resolve(default_config()), {"model.num_classes": len(some)})
    judged = Judged("test", found, judge(found, len(some), draws=5))
    text = write_report(tmp_path, config=config, metrics=[], info={}, judged=judged, class_names=some).read_text(
        encoding="utf-8"
    )
    check_page(text)
    assert 'class="matrix"' in text
    figure = text[text.index("<h3>ROC</h3>") :].partition("</figure>")[0]
    for shown in ("_hidden", "$x^2$ $\\frac$", "&lt;script&gt;", "x\\n\\x1b", "\\xff"):
        assert shown in re.sub("<svg[^>]*>", "", figure), shown  # in the drawn legend, not only in its data


def test_the_card_of_an_export(network):
    accuracy = {"dataset": "d", "split": "s", "count": 10, "top1": 0.5}
    card = make_card(network, "f", "safetensors", "0" * 64, uint8=False, evaluation=accuracy, difference=None)
    for name in NASTY:
        named = {"file": name, "source": name, "source_sha256": name, "load": loading_code(name, "onnx", "pass")}
        named["evaluation"] = accuracy | {"dataset": name, "split": name}
        text = as_markdown(card | named)
        check_text(text)
        assert markdown_problems(text) == []
        json.loads(json.dumps(card | named))
        compile(named["load"], "card", "exec")


def test_the_code_and_the_sum_of_an_export_name_its_file(tmp_path):
    for name in FILES:
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(b"content")
        code = loading_code(str(path), "stablehlo", "pass")
        check_text(code)
        opened = next(line for line in code.splitlines() if "open(" in line)
        with eval(opened[opened.index("open(") : opened.index(".read")]) as file:
            assert file.read() == b"content"
        Path(f"{path}.sha256").write_bytes(
            checksum_line("ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73", path.name)
        )
        check_sha256(path)
        command = ["sha256sum", "--check", "--status", b"./" + name + b".sha256"]
        subprocess.run(command, cwd=tmp_path, check=True)
    assert loading_code("a b.onnx", "onnx", "x").count('InferenceSession("a b.onnx"') == 1


def test_the_report_of_a_study(tmp_path, capsys):
    question = "".join(NASTY[:3]) + "<script>alert(1)</script> [a](http://x) | b"
    study = small_study(name="x\n#SBATCH --wrap=forged $(ls)", question=question, hypothesis=question, seeds=(0,))
    stored = write_simulated(tmp_path / "a study", study, fail=[("1_none", 0)])
    failed = next(cell for cell in stored.cells() if cell.arm == "1_none")
    failed.write_record(exit_code=70, message=NASTY[0] + "\x1b")
    results = write_study_report(stored.root)
    check_text(format_results(results))
    check_page((stored.root / "report.html").read_text(encoding="utf-8"))
    text = (stored.root / "report.md").read_text(encoding="utf-8")
    check_text(text)
    assert set(markdown_problems(text)) == {"image"}  # its own figures
    for figure in (stored.root / "figures").iterdir():
        ElementTree.parse(figure)
    check_text(list_cells(study))
    runner = Runner([], [], {}, lambda runner: None)
    runner.finished.append((failed, 70))
    stream = io.StringIO()
    table = ProgressTable(study, stored.costs, stored.cells(), {}, 1, 0, stream)
    table.show(runner)
    check_text(stream.getvalue())
    assert stream.getvalue().count("\n") == 2
    check_text("\n".join(table.table(runner, 100, 200)))
    script = slurm_script(stored, "true", 1)
    check_text(script)
    assert not [line for line in script.splitlines() if line.startswith("#SBATCH --wrap")]
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert re.fullmatch("#SBATCH --job-name=[^ ]+", directives[0])


def test_what_prepare_prints(capsys):
    contents, skipped = Contents(), Skipped()
    for name in NASTY:
        contents.add("train", name, None)
        skipped.add("damaged", Path("a") / name.replace("\0", ""))
    check_text("\n".join(contents.lines(NASTY)))
    assert len(contents.lines(NASTY)) == Contents.CLASSES_SHOWN + 3
