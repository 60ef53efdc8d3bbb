"""A run on a folder with groups, from its first report to the judgement of its single logit."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from configs import fashion_mnist
from tests.evaluation.test_evaluate_command import run
from xception_jax.config import override, resolve
from xception_jax.data.prepare.image_folder import Skipped, image_folder
from xception_jax.data.prepare.writer import write_dataset
from xception_jax.errors import InputMissingError, PreemptedError, StorageError, UsageError
from xception_jax.metrics.judgement import choose_thresholds
from xception_jax.metrics.predictions import load_predictions
from xception_jax.reports.live import mark_resumed
from xception_jax.training import loop
from xception_jax.training.train import train

SIZES = {"train": 48, "validation": 40, "test": 60}


def write_folder(directory):
    """Noise with a bright or a dark patch, two to four images of each patient, in splits."""
    rng = np.random.default_rng(0)
    for split, count in SIZES.items():
        for i in range(count):
            label = ("benign", "malignant")[i % 2]
            image = rng.integers(0, 200, (32, 32, 3), np.uint8)
            image[8:20, 8:20] = np.clip(image[8:20, 8:20] + 45.0 * (i % 2), 0, 255)
            path = directory / split / label / f"{split}-patient{i // 6 * 2 + i % 2}-{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    return directory


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("folder")
    folder = image_folder(write_folder(directory / "photos"), "lesions", Skipped(), groups=r"(\w+-patient\d+)")
    write_dataset(folder, directory / "tfds", progress=False)
    fields = {
        "model.width_multiplier": 0.05,
        "model.middle_blocks": 0,
        "model.num_classes": 1,
        "data.name": "lesions",
        "data.data_dir": str(directory / "tfds"),
        "data.train_split": "train",
        "data.eval_split": "validation",
        "data.test_split": "test",
        "batch_size": 16,
        "evaluation.batch_size": 20,
        "duration": "6 steps",
        "evaluation.every": "3 steps",
        "evaluation.heat_maps": 0,
    }
    return override(resolve(fashion_mnist.get_config()), fields)


@pytest.fixture(scope="module", autouse=True)
def live_reports_from_the_start():
    """These runs end before the time at which a run writes its first report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "FIRST_LIVE_REPORT", 0.0)
        yield


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Returns the work directory of a run, and the report that stood in it while the run went on."""
    workdir = tmp_path_factory.mktemp("run")
    live: list[str] = []
    ended = threading.Event()

    def watch():
        path = workdir / "report.html"
        while not ended.is_set() and not live:
            if path.exists():
                live.append(path.read_text())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(config, str(workdir))
    finally:
        ended.set()
        watcher.join()
    return workdir, live[0]


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluated")
    files = [
        "--mistakes",
        directory / "m.csv",
        "--per_class",
        directory / "c.csv",
        "--predictions",
        directory / "p.npz",
    ]
    return json.loads(run(finished[0], "--json", "--at", 0.9, *files)), directory


@pytest.mark.slow
def test_the_report_is_there_while_the_run_goes_on(finished):
    workdir, live = finished
    assert live.endswith("</html>\n") or live.endswith("</html>")
    assert 'id="live"' in live
    assert "step 3 of 6 (epoch 1)" in live
    assert "Split <code>validation</code>, 40 images of 14 groups." in live
    assert "validation/malignant/validation-patient" in live or "validation/benign/validation-patient" in live
    last = (workdir / "report.html").read_text()
    assert 'id="live"' not in last
    assert "Split <code>test</code>, 60 images of 20 groups" in last


@pytest.mark.slow
def test_the_report_of_a_run_that_was_asked_to_stop_says_so(config, tmp_path):
    path = tmp_path / "report.html"

    def stop_when_live():
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_live, daemon=True)
    stopper.start()
    with pytest.raises(PreemptedError):
        train(override(config, {"duration": "3000 steps"}), str(tmp_path))
    stopper.join()
    stopped = "This run has stopped: run the same command to resume."
    report = path.read_text()
    assert report.count(stopped) == 1
    shown = re.sub("<template>.*?</template>", "", report, flags=re.DOTALL)
    assert 'id="live"' not in shown
    assert 'http-equiv="refresh"' not in shown

    # The page of a killed run, which then fails before its first step.
    mark_resumed(tmp_path)
    assert stopped not in path.read_text()
    dataset = Path(config.data.data_dir)
    dataset.rename(dataset.with_name("elsewhere"))
    try:
        with pytest.raises(InputMissingError):
            train(override(config, {"duration": "3000 steps"}), str(tmp_path))
    finally:
        dataset.with_name("elsewhere").rename(dataset)
    assert path.read_text().count(stopped) == 1


def test_the_judgement_of_a_single_logit_is_scikit_learns(evaluated):
    found, directory = evaluated
    saved = load_predictions(directory / "p.npz")
    scores = saved.all_probabilities[:, 1]
    np.testing.assert_allclose(saved.all_probabilities.sum(axis=1), 1, atol=1e-6)
    judged = found["judgement"]
    assert (judged["images"], judged["groups"], judged["bootstrap_draws"]) == (60, 20, 2000)
    assert judged["roc_auc"] == pytest.approx(roc_auc_score(saved.label, scores))
    assert judged["classes"][1]["average_precision"] == pytest.approx(average_precision_score(saved.label, scores))
    assert judged["macro_f1"] == pytest.approx(f1_score(saved.label, saved.classes[:, 0], average="macro"))
    assert judged["by_group"]["count"] == 20
    assert "top1_interval" not in found  # images of a patient are not independent
    assert len(judged["accuracy_interval"]) == 2


def test_thresholds_are_chosen_on_the_development_split(evaluated, finished, tmp_path):
    found, _ = evaluated
    alone = json.loads(run(finished[0], "--json", "--split", "validation", "--predictions", tmp_path / "v.npz"))
    assert alone["judgement"]["thresholds"] == []
    chosen = [entry.value for entry in choose_thresholds(load_predictions(tmp_path / "v.npz"), 0.9)]
    assert [row["threshold"] for row in found["judgement"]["thresholds"]] == pytest.approx(chosen, abs=1e-6)
    on_test = [entry.value for entry in choose_thresholds(load_predictions(evaluated[1] / "p.npz"), 0.9)]
    assert chosen != pytest.approx(on_test, abs=1e-5)
    assert found["thresholds_split"] == "validation"
    rows = found["judgement"]["thresholds"]
    assert [(row["name"], row["aim"], row["at"]) for row in rows[3:]] == [
        ("malignant", "equal_error", None),
        ("malignant", "specificity", 0.9),
        ("malignant", "sensitivity", 0.9),
    ]
    judged = json.loads(run(finished[0], "--json", "--at", 0.9, "--split", "validation", "--thresholds", "test"))
    assert judged["thresholds_split"] == "test"
    for split, thresholds in (("test", "test"), ("test", "test[:50%]"), ("validation[10:]", "validation")):
        with pytest.raises(UsageError, match="has images of the split that is evaluated"):
            run(finished[0], "--split", split, "--thresholds", thresholds)
    assert "thresholds_split" not in json.loads(run(finished[0], "--json", "--split", "validation[:20]"))


def test_new_images_without_a_development_split(evaluated, finished, config, tmp_path, capsys):
    """Without --thresholds, they are evaluated, and no thresholds are chosen."""
    there = Path(config.data.data_dir) / config.data.name
    shutil.copytree(there, tmp_path / config.data.name)
    for path in tmp_path.rglob("dataset_info.json"):
        info = json.loads(path.read_text())
        info["splits"] = [split for split in info["splits"] if split["name"] == "test"]
        path.write_text(json.dumps(info))
    found = json.loads(run(finished[0], "--json", "--data_dir", tmp_path, "--split", "test"))
    assert found["top1"] == evaluated[0]["top1"]
    assert found["judgement"]["thresholds"] == []
    assert "note: no thresholds were chosen" in capsys.readouterr().err
    with pytest.raises(InputMissingError):
        run(finished[0], "--data_dir", tmp_path, "--split", "test", "--thresholds", "validation")
    with pytest.raises(UsageError, match=r"--at is 1\.5"):
        run(finished[0], "--at", 1.5)


def test_mistakes_come_by_file_name(evaluated, finished):
    found, directory = evaluated
    with open(directory / "m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    saved = load_predictions(directory / "p.npz")
    assert len(rows) == len(found["mistakes"]) == (~saved.right).sum() > 0
    for row in rows:
        assert row["file"] == str(saved.file_name[int(row["index"])])
        assert row["file"].startswith(f"test/{row['label']}/")
        assert row["group"] == str(saved.group[int(row["index"])])
        assert float(row["label_probability"]) <= float(row["probability"])
    confidence = [float(row["probability"]) for row in rows]
    assert confidence == sorted(confidence, reverse=True)
    assert rows[0]["file"] in (finished[0] / "report.html").read_text()
    with open(directory / "c.csv", newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert float(table["malignant"]["specificity_threshold"]) == found["judgement"]["thresholds"][4]["threshold"]


def test_the_report_and_the_text_show_the_same(evaluated, finished):
    text = run(finished[0])
    judged = json.loads(run(finished[0], "--json"))["judgement"]
    page = (finished[0] / "report.html").read_text()
    low, high = judged["macro_f1_interval"]
    assert f"F1, mean of classes         {judged['macro_f1']:.4f}  [{low:.4f}, {high:.4f}]" in text
    assert f'{judged["macro_f1"]:.4f}<br><span class="quiet">{low:.4f} to {high:.4f}</span>' in page
    assert "20 groups by the mean probability of their images" in text
    assert "at thresholds chosen on validation" in text
    point = judged["thresholds"][4]
    assert f"specificity 0.95    {point['threshold']:>9.4f}" in text
    table = page[page.index("Thresholds, chosen on the development split") :]
    printed = re.findall(r'</td><td class="n">(0\.\d{4})</td>', table[: table.index("</table>")])
    assert printed == [f"{entry['threshold']:.4f}" for entry in judged["thresholds"]]
    assert text.count("test/") >= 1
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_a_report_that_cannot_be_written_stops_no_training(config, tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match="the report cannot be written"):
        train(config, str(tmp_path))
    out = capsys.readouterr()
    assert "the report was not written, training goes on: IsADirectoryError" in out.out + out.err
    assert (tmp_path / "predictions_test.npz").exists()
    (tmp_path / "report.html").rmdir()
    summary = train(config, str(tmp_path))  # a finished run: it only evaluates
    assert "(60 images of 20 groups)" in str(summary)
    text = (tmp_path / "report.html").read_text()
    assert "Thresholds, chosen on the development split" in text


def test_predictions_of_earlier_releases_load(evaluated, tmp_path):
    with np.load(evaluated[1] / "p.npz") as arrays:
        assert set(arrays) == {"index", "label", "classes", "probabilities", "all_probabilities", "file_name", "group"}
        old = {name: arrays[name] for name in ("index", "label", "classes", "probabilities")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **old)
    (tmp_path / "old.npz").write_bytes(buffer.getvalue())
    loaded = load_predictions(tmp_path / "old.npz")
    assert loaded.all_probabilities is loaded.file_name is loaded.group is None
