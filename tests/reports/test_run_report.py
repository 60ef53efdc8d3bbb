import base64
import dataclasses
import hashlib
import html
import html.parser
import io
import math
import re

import matplotlib
import numpy as np
import pytest
from matplotlib import _pylab_helpers
from PIL import Image

from xception_jax import config as config_lib
from xception_jax.evaluation import judgement_text
from xception_jax.metrics.judgement import choose_thresholds, judge
from xception_jax.metrics.predictions import Predictions, most_confused
from xception_jax.reports.curves import Line, _series, _thin, line_figure
from xception_jax.reports.mistakes import MAX_CELL_IMAGES, MAX_IMAGES, choose_cells, choose_examples
from xception_jax.reports.run import Judged, Live, write_report

EVIL = "<script>alert('x')</script>"
INFO = {
    "devices": "8 x <b>",
    "parameters": 22_855_952,
    "multiply_adds": 8_357_403_496,
    "total_steps": 300,
    "wall_seconds": 5000.0,
    "seconds_to_first_step": 42.0,
    "eval_images_per_second": 1234.0,
    "peak_memory_bytes": 1_310_000_000,
    "command": "python train.py --config=configs/x.py && echo '<i>'",
    "commit": "0123abc",
    "versions": {"jax": "0.10.2"},
}
_VOID = {"meta", "img", "br", "link", "hr"}
_INLINE = {"b", "code", "span"}


class Page(html.parser.HTMLParser):
    """The elements of a page, their attributes and text; fails where tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)
        if tag not in _INLINE:
            self.text += " "

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and "template" not in self.open:
            self.text += data

    @property
    def words(self):
        return " ".join(self.text.split())


def make_config(num_classes=10, **changes):
    fields = {"name": "first run", "model.num_classes": num_classes}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return config_lib.override(config_lib.resolve(config_lib.default_config()), fields)


def make_metrics(test=True):
    metrics = [
        {"step": s, "split": "train", "loss": 5 / s, "learning_rate": 0.1, "images_per_second": 100.0 + s}
        for s in range(10, 301, 10)
    ]
    metrics[5] |= {"loss": math.nan, "images_per_second": math.nan}
    for s in (100, 200, 300):
        dev = {"step": s, "split": "dev", "loss": 1.0, "top1": 0.5, "top5": 0.75, "count": 50}
        metrics.append(dev | {"ema_loss": 0.75, "ema_top1": 0.625, "ema_top5": 0.875})
    if test:
        last = {"step": 300, "split": "test", "loss": 1.25, "top1": 0.790, "top5": 0.945, "count": 50_000}
        metrics.append(last | {"ema_loss": 1.125, "ema_top1": 0.800, "ema_top5": 0.950})
    return metrics


RESULT = make_metrics()[-1:]


def make_predictions(n=60, c=10, multi_label=False):
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(c), n)
    classes = np.argsort(-scores, axis=1)[:, :5]
    label = rng.integers(0, c, n)
    label[: n // 2] = classes[: n // 2, 0]
    if multi_label:
        label = (rng.random((n, c)) < 0.1) | (np.arange(c) == label[:, None])
        label[-5:] = False
    best = np.take_along_axis(scores, classes, axis=1)
    return Predictions(
        np.arange(n) + 1000,
        label,
        classes,
        best,
        all_probabilities=scores.astype(np.float32) if c <= 10 else None,
        file_name=np.array([f"photos/{i}.jpg" for i in range(n)]),
    )


def judged(predictions, images=None, c=10, **parts):
    thresholds = choose_thresholds(make_predictions(c=c)) if not predictions.multi_label else ()
    return Judged("validation", predictions, judge(predictions, c, thresholds, draws=50), images or {}, **parts)


def make_images(predictions, size=28):
    rng = np.random.default_rng(1)
    return {
        index: rng.integers(0, 256, (size, size, 3), np.uint8)
        for chosen in (*choose_examples(predictions), *choose_cells(predictions, 10).values())
        for index in chosen
    }


def render(tmp_path, config=None, metrics=None, info=INFO, **parts):
    path = write_report(
        tmp_path,
        config=config or make_config(),
        metrics=RESULT if metrics is None else metrics,
        info=info,
        **parts,
    )
    assert path == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def render_full(tmp_path):
    predictions = make_predictions()
    names = [EVIL, *(f"name & {i}" for i in range(1, 10))]
    parts = judged(predictions, make_images(predictions))
    return render(tmp_path, make_config(data__name=EVIL), make_metrics(), judged=parts, class_names=names)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return render_full(tmp_path_factory.mktemp("full"))


def test_the_result_comes_with_its_interval(full):
    words = Page(full).words
    assert words.startswith("first run first run xception on")
    assert "80.00 % top-1 accuracy, Polyak average of the weights 95 % interval 79.65 % to 80.35 %" in words
    assert "last weights 79.00 % 78.64 % to 79.35 % 94.50 % 1.25" in words
    assert "Test split validation, 50,000 images, at step 300." in words
    assert "has not finished" not in words


def test_everything_from_outside_is_escaped(full):
    page = Page(full)
    assert page.tags.count("script") == 1
    assert "8 x <b>" not in full
    assert "<i>" not in full
    assert "&lt;script&gt;" in full
    assert EVIL in page.text
    assert INFO["devices"] in page.text
    assert INFO["command"] in page.text


def test_the_page_needs_nothing_else(full):
    page = Page(full)
    assert {"link", "iframe", "object"}.isdisjoint(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/", "#")), value
        assert name == "style" or not name.startswith("on")
    assert "url(http" not in full
    assert "@import" not in full
    assert page.tags.count("svg") == 6
    script = full[full.rindex("<script>") + 8 : full.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(full)  # this script and no other


def test_ids_are_unique_and_each_reference_has_one(full):
    attributes = Page(full).attributes
    # A clip path or marker that figures share has the same content and so the same id.
    assert not [value for name, value in attributes if name == "id" and re.match(r"(figure|axes|patch|line2d)_", value)]
    ids = {value for name, value in attributes if name == "id"}
    references = {v[1:] for name, v in attributes if name == "xlink:href"} | set(re.findall(r"url\(#([^)]+)\)", full))
    assert references
    assert references <= ids


def test_no_environment_variable_reaches_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("XCEPTION_TEST_TOKEN", "a-token-nobody-may-see")
    text = render(tmp_path, judged=judged(make_predictions()))
    assert "a-token-nobody-may-see" not in text
    assert "XCEPTION_TEST_TOKEN" not in text


def test_the_same_run_gives_the_same_bytes(tmp_path, full):
    again = render_full(tmp_path)
    assert again == full


def test_images_say_in_words_and_marks_whether_they_are_right(full):
    shown = full[full.index("<h3>Most confident mistakes") : full.index("<h2>Training")]
    classes = re.findall(r'class="(card [a-z]+)"', shown)
    predictions = make_predictions()
    sample, mistakes = choose_examples(predictions)
    right = {int(i): bool(r) for i, r in zip(predictions.index, predictions.right, strict=True)}
    assert classes == ["card right" if right[i] else "card wrong" for i in mistakes + sample]
    wrong = classes.count("card wrong")
    assert shown.count("✗") == shown.count("label: ") == wrong
    assert shown.count("✓") == len(classes) - wrong > 0
    assert re.findall(r"photos/\d+\.jpg", shown) == [f"photos/{i - 1000}.jpg" for i in mistakes + sample]
    first = re.search(r'src="data:image/png;base64,([^"]+)"', shown)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))))
    np.testing.assert_array_equal(pixels, make_images(predictions)[mistakes[0]])


def test_a_cell_of_the_confusion_matrix_has_its_images(full):
    predictions = make_predictions()
    cells = choose_cells(predictions, 10)
    best = predictions.classes[:, 0]
    assert set(cells) == set(zip(predictions.label.tolist(), best.tolist(), strict=True))
    for (label, predicted), chosen in cells.items():
        positions = np.array(chosen) - 1000
        assert (predictions.label[positions] == label).all()
        assert (best[positions] == predicted).all()
        confidence = predictions.probabilities[positions, 0]
        assert (np.diff(confidence) <= 0).all()
        assert full.count(f'data-cell="{label}-{predicted}"') == 1
        template = full[full.index(f'<template id="cell-{label}-{predicted}">') :]
        assert template[: template.index("</template>")].count("<img") == len(chosen)
    many = make_predictions(n=4000)
    sizes = [len(chosen) for chosen in choose_cells(many, 10).values()]
    assert sum(sizes) == MAX_IMAGES
    assert max(sizes) <= MAX_CELL_IMAGES
    assert min(sizes) >= 1
    wrong = [cell for cell in choose_cells(many, 10) if cell[0] != cell[1]]
    assert len(wrong) == 90  # mistakes come first
    many = make_predictions(n=4000, c=40)
    assert set(choose_cells(many, 40)) == {(a, b) for a, b, _ in most_confused(many, 20)}  # only they have a button


def test_heat_maps_stand_beside_their_images(tmp_path):
    predictions = make_predictions()
    images = make_images(predictions)
    sample, (mistake, *_) = choose_examples(predictions)
    text = render(tmp_path, judged=judged(predictions, images, heat_maps={mistake: images[mistake]}))
    assert text.count('class="heat-map"') == 2 + (mistake in sample)  # a mistake, and in its cell
    assert "Grad-CAM" in text
    assert "Grad-CAM" not in render(tmp_path, judged=judged(predictions, images))


def test_the_judgement_has_the_numbers_of_evaluate(full):
    words = Page(full).words
    parts = judged(make_predictions())
    text = judgement_text.as_text(parts.judgement, [f"c{i}" for i in range(10)], [])
    for scores in parts.judgement.classes:
        assert f"{scores.f1.value:.4f}" in text
        assert f"{scores.f1.value:.4f} {scores.f1.low:.4f} to {scores.f1.high:.4f}" in words
    assert "bootstrap over 60 images, 50 draws" in words
    assert "Macro" not in words
    assert f"Area under ROC {parts.judgement.overall['roc_auc'].value:.4f}" in words
    assert "Thresholds, chosen on the development split" in words


def test_groups_replace_the_interval_of_independent_images(tmp_path):
    predictions = dataclasses.replace(make_predictions(), group=np.arange(60).astype(str))
    words = Page(render(tmp_path, judged=judged(predictions))).words
    assert "60 images of 60 groups; 95 % intervals: bootstrap over 60 groups, 50 draws." in words
    assert "Accuracy of 60 groups" in words
    assert "Wilson" not in words


def test_a_live_report_reloads_and_a_finished_one_does_not(tmp_path, full):
    live = render(tmp_path, metrics=make_metrics(test=False), live=Live(written=1e9, seconds=60.0))
    assert "This run is still in progress." in Page(live).words
    assert 'http-equiv="refresh"' in live
    assert 'data-written="1000000000.0" data-seconds="60.0"' in live
    assert "has not finished" not in live
    assert 'http-equiv="refresh"' not in full
    assert 'id="live"' not in full


def test_a_live_report_of_an_extended_run_does_not_show_the_test_result_of_the_shorter_one(tmp_path):
    live = Page(render(tmp_path, metrics=make_metrics(test=True), live=Live(written=1e9, seconds=60.0))).words
    assert "62.50 % top-1 accuracy, Polyak average of the weights" in live
    assert "There is no test result yet. Development split" in live


def test_steps_come_with_their_epoch(tmp_path):
    text = render(tmp_path, metrics=make_metrics(), info=INFO | {"steps_per_epoch": 40.0})
    assert "step 300 of 300 (epoch 7.5), seed" in Page(text).words
    assert "at step 300 (epoch 7.5)." in Page(text).words
    assert text.count(">epoch</text>") == 3
    assert "&quot;steps_per_epoch&quot;: 40.0" in text


def test_large_images_become_small_ones_and_grey_ones_work(tmp_path):
    predictions = make_predictions()
    images = make_images(predictions, size=600)
    some_grey = {i: image[..., :1] if i % 2 else image for i, image in images.items()}
    text = render(tmp_path, judged=judged(predictions, some_grey))
    sources = [value for name, value in Page(text).attributes if name == "src"]
    sizes = {Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).size for s in sources}
    assert sizes == {(160, 160)}
    assert all(s.startswith("data:image/jpeg") for s in sources)


def test_examples_are_an_even_sample_and_the_surest_mistakes():
    predictions = make_predictions()
    sample, mistakes = choose_examples(predictions, 6)
    assert sample == [1000, 1010, 1020, 1030, 1040, 1050]
    wrong = sorted(np.flatnonzero(~predictions.right), key=lambda i: -predictions.probabilities[i, 0])
    assert mistakes == [1000 + i for i in wrong[:6]]
    few, none = choose_examples(Predictions(np.arange(2), np.zeros(2, int), np.zeros((2, 1), int), np.ones((2, 1))))
    assert (few, none) == ([0, 1], [])


def test_the_confusion_matrix_has_every_count(full):
    predictions = make_predictions()
    table = full[full.index('<table class="matrix">') : full.index("</table>", full.index('<table class="matrix">'))]
    cells = [int(re.sub("<[^>]*>", "", text) or 0) for text in re.findall(r"<td[^>]*>(.*?)</td>", table)]
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (predictions.label, predictions.classes[:, 0]), 1)
    assert cells == expected.ravel().tolist()


def test_many_classes_get_a_list_of_pairs(tmp_path):
    label = np.array([3] * 4 + [7] * 6)
    best = np.array([39, 39, 39, 3, 7, 7, 7, 7, 7, 1])
    predictions = Predictions(np.arange(10), label, best[:, None], np.ones((10, 1)))
    parts = judged(predictions, c=40)
    words = Page(render(tmp_path, make_config(num_classes=40), judged=parts, class_names=["a"])).words
    assert "Most confused Label Predicted Images Share of the label class 3 class 39 3 75.0 %" in words
    assert "correct for 6 of 10 images (60.00 %)" in words


def test_several_labels(tmp_path):
    config = make_config(loss__name="sigmoid")
    entry = {"step": 300, "split": "test", "loss": 3.0, "map_at_k": 0.0636, "map_at_k_all": 0.05, "count": 60}
    entry |= {"ema_loss": 2.0, "ema_map_at_k": 0.067, "ema_map_at_k_all": 0.06, "unlabelled": 5}
    predictions = make_predictions(multi_label=True)
    parts = judged(predictions, make_images(predictions))
    text = render(tmp_path, config, [*make_metrics(test=False), entry], judged=parts)
    words = Page(text).words
    assert "6.70 % MAP@100, Polyak average of the weights" in words
    assert "last weights 6.36 % 5.00 % 3" in words
    assert "5 images without labels are excluded" in words
    assert "Wilson" not in words
    right = int(predictions.right.sum())
    assert f"one of the labels for {right} of 55 images with labels" in words
    assert "Average precision of each class over the images that have labels." in words
    assert "labels: no label" not in words.partition("Most confident mistakes")[2].partition("Even sample")[0]
    assert words.count("labels: class") == len(make_images(predictions)) + sum(
        index in choose_examples(predictions)[0] for index in choose_examples(predictions)[1]
    ) - words.count("labels: no label")


def test_classes_are_cut_to_the_best_and_the_worst(tmp_path):
    config = make_config(num_classes=50, loss__name="sigmoid")
    parts = judged(make_predictions(n=300, c=50, multi_label=True), c=50)
    words = Page(render(tmp_path, config, judged=parts)).words
    assert "The table shows the 10 best and the 10 worst of 50 classes." in words
    precisions = [float(p) for p in re.findall(r"class \d+ \d+ ([\d.]+) %", words)]
    assert len(precisions) == 20
    assert precisions == sorted(precisions, reverse=True)


def test_an_interrupted_run_says_so_and_shows_the_development_split(tmp_path):
    metrics = [entry for entry in make_metrics(test=False) if entry["step"] <= 200]
    words = Page(render(tmp_path, metrics=metrics)).words
    assert "This run has not finished. This report shows its state at step 200." in words
    assert "62.50 % top-1 accuracy" in words
    assert "There is no test result yet. Development split train[98%:], 50 images, at step 200." in words


def test_a_run_without_anything_yet(tmp_path):
    words = Page(render(tmp_path, metrics=[], info={})).words
    assert "Nothing has been evaluated yet." in words
    assert "Training" not in words
    assert "How to reproduce this run" not in words


def test_a_run_without_a_polyak_average_or_a_count(tmp_path):
    metrics = [{"step": 5, "split": "test", "top1": 0.5, "loss": math.nan}]
    words = Page(render(tmp_path, metrics=metrics, info={})).words
    assert "50.00 % top-1 accuracy, last weights" in words
    assert "interval" not in words
    assert "Polyak" not in words.partition("Config")[0]


def test_the_config_shows_what_differs_from_the_defaults_and_everything(tmp_path):
    config = make_config(batch_size=256, data__crop_area=(0.08, 1.0))
    words = Page(render(tmp_path, config)).words
    assert "batch_size 256 1920 inferred: 60 replicas of 32" in words
    assert "data.crop_area (0.08, 1.0) (0.05, 1.0)" in words
    table, whole = words[words.index("Source of the default") :].split("The full config")
    assert "optimizer.momentum" not in table
    assert '"momentum": 0.9' in whole


def test_costs(full):
    words = Page(full).words
    for fact in (
        "Wall time 1h 23m",
        "Time to the first step 42s",
        "Training 260 images/s",
        "Evaluation 1,234 images/s",
        "Peak memory per device 1.31 GB",
        "Parameters 22,855,952",
        "Multiply-adds per image 8.36 G",
        "Commit 0123abc. jax 0.10.2.",
    ):
        assert fact in words, fact


def test_the_time_is_divided_among_activities(tmp_path, full):
    spent = {"steps": 4500.0, "input": 0.0, "saving": 125.0, "away": 375.0}
    words = Page(render(tmp_path, info=INFO | {"time_spent": spent})).words
    assert (
        "Time since the first start Activity Time Share Training steps 1h 15m 90.0 % "
        "Blocked by saving a checkpoint 2m 05s 2.5 % Not running 6m 15s 7.5 %"
    ) in words
    assert "Time since the first start" not in Page(full).words


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    before = render(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        render(tmp_path, make_config(seed=7))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_figures_leave_out_what_is_not_finite_and_thin_out_by_averaging():
    line = Line("train", "loss", "loss", {"color": "#000"})
    assert line_figure([{"step": 1, "split": "train", "loss": math.nan}], [line]) is None
    assert line_figure([{"step": 1, "split": "dev", "loss": 1.0}], [line]) is None
    # Alternating 0 and 1 averages to one half; any choice among the points would show 0 or 1.
    entries = [{"step": s, "split": "train", "loss": s % 2} for s in range(4000)]
    steps, values = _thin(*_series(entries, line))
    assert len(steps) == 400
    assert set(values) == {0.5}
    assert steps[0] == 4.5
    assert len(line_figure(entries, [line])) < 30_000


def test_plotting_leaves_the_settings_of_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    assert before["svg.hashsalt"] is None
    assert Page(render(tmp_path, metrics=make_metrics())).tags.count("svg") == 3
    assert dict(matplotlib.rcParams) == before
    assert _pylab_helpers.Gcf.figs == {}
