"""`predict`: any image that can be decoded, every other one named, the same answer in any batch."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import fashion_mnist, multilabel
from tests.conftest import run_command
from tests.data.small_imagenet import jpeg, photograph, photographs
from xception_jax.cli import predict as command
from xception_jax.config import override, resolve
from xception_jax.data import folders, imagenet_classes
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.evaluation import contact_sheet, predict
from xception_jax.evaluation.evaluate import evaluate, make_evaluation_step
from xception_jax.metrics import metrics_of
from xception_jax.metrics.predictions import Predictions
from xception_jax.runs import open_network
from xception_jax.weights import save_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("folder")
    (directory / "inner").mkdir()
    for number in range(3):
        Image.fromarray(photographs()[number]).save(directory / f"{number}.png")
    cat = Image.fromarray(photographs()[2])
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.rotate(90, expand=True).save(directory / "inner" / "rotated.webp", exif=exif, lossless=True)
    cat.convert("CMYK").save(directory / "inner" / "cmyk.JPEG", quality=95)
    cat.convert("L").save(directory / "inner" / "grey.jpg")
    (directory / ".hidden.jpg").write_bytes(b"")
    (directory / "notes.txt").write_text("no image")
    return directory


run = partial(run_command, command)


def test_every_format_in_a_folder_is_predicted(weights, folder, capsys):
    assert run("--weights", weights, folder, "--json", "--top", 3) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    names = [str(Path(entry["file"]).relative_to(folder)) for entry in found]
    assert names == ["0.png", "1.png", "2.png", "inner/cmyk.JPEG", "inner/grey.jpg", "inner/rotated.webp"]
    assert f"left out of {folder}, because of their suffixes: 1 .txt" in err
    words = imagenet_classes.class_words()
    for entry in found:
        best = entry["predictions"]
        assert [p["name"] for p in best] == [words[imagenet_classes.class_names()[p["class"]]] for p in best]
        shares = [p["probability"] for p in best]
        assert shares == sorted(shares, reverse=True)
        assert len(best) == 3
    upright, rotated = found[2]["predictions"], found[5]["predictions"]
    assert [p["class"] for p in upright] == [p["class"] for p in rotated]
    assert rotated[0]["probability"] == pytest.approx(upright[0]["probability"], abs=1e-5)
    assert found[0]["predictions"] != found[1]["predictions"]


def test_the_answer_does_not_depend_on_the_batch(weights, folder):
    network, paths = open_network(str(weights)), predict.find_images([str(folder)])
    whole, pairs = (list(predict.predict(network, paths, batch_size=size)) for size in (32, 2))
    for a, b in zip(whole, pairs, strict=True):
        assert (a.path, a.classes) == (b.path, b.classes)
        np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-4)


def test_folders_are_searched_as_their_owner_sees_them(tmp_path):
    names = ["b/one.png", ".thumbnails/t.png", "__MACOSX/m.png", "b/._one.png", "b/notes.txt"]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "two.JPG").touch()
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b" / "circle").symlink_to(tmp_path / "photos")
    found = predict.find_images([str(tmp_path / "photos")])
    assert [str(path.relative_to(tmp_path / "photos")) for path in found] == ["a/two.JPG", "b/one.png"]
    with pytest.raises(StorageError, match="cannot be read"):
        folders.entries(tmp_path / "elsewhere" / "two.JPG")


def test_a_damaged_image_is_named_and_the_others_predicted(weights, folder, tmp_path, capsys):
    data = jpeg(photograph(1, 200))
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "odd\nname.png").write_bytes(b"\x89PNG")
    with pytest.raises(BadDataError, match="2 of 3 images cannot be read, all others") as raised:
        run("--weights", weights, tmp_path, "--batch_size", 2)
    assert raised.value.exit_code == 65
    out, errors = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 5
    assert out.splitlines()[0].endswith("whole.jpg")
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        f"{tmp_path}/cut.jpg",
        rf"{tmp_path}/odd\nname.png",
    ]
    with pytest.raises(BadDataError, match="2 of 2 images cannot be read\n"):
        run("--weights", weights, tmp_path / "cut.jpg", tmp_path / "odd\nname.png", "--batch_size", 2)
    capsys.readouterr()
    with pytest.raises(BadDataError):
        run("--weights", weights, tmp_path, "--json", "--batch_size", 2)
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in entry for entry in entries] == [True, True, False]


def test_what_is_not_there_is_said_before_the_network_is_opened(weights, folder, tmp_path):
    for missing in (folder / "9.png", folder / ("long" * 2000), tmp_path):
        with pytest.raises(InputMissingError) as raised:
            run("--weights", tmp_path / "nothing.safetensors", folder / "0.png", missing)
        assert str(missing) in raised.value.where
    with pytest.raises(InputMissingError, match=r"nothing|no such|not there"):
        run("--weights", tmp_path / "nothing.safetensors", folder)
    with pytest.raises(UsageError, match="is a PNG"):
        run("--weights", weights, folder, "--contact_sheet", tmp_path / "sheet.jpg")


def test_a_contact_sheet_holds_every_image(weights, folder, tmp_path, capsys):
    run("--weights", weights, folder, folder / "0.png", "--batch_size", 2, "--contact_sheet", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    # Three columns and two rows of pictures: as many runs of columns that are not white.
    assert pixels.shape[1] > pixels.shape[0] > 600
    beginnings = np.diff((pixels[: pixels.shape[0] // 3] < 250).any(axis=(0, 2)).astype(int))
    assert (beginnings == 1).sum() >= 3
    blue = (np.abs(pixels - (0, 0x72, 0xB2)) < 8).all(axis=2)
    assert blue.any(axis=1).sum() >= 2  # the bars of the probabilities


def test_any_name_stands_below_its_image(monkeypatch, caplog):
    image = photograph(0)

    def sheet(name: str, *fonts: str) -> np.ndarray:
        monkeypatch.setattr(contact_sheet, "_FONTS", ("DejaVu Sans", *fonts))
        data = contact_sheet.draw([contact_sheet.Tile(image, name, name, 0), contact_sheet.Tile(image, "", "", 0)])
        return np.asarray(Image.open(io.BytesIO(data)).convert("L"))

    # No font here need have these: a warning would be an error. Long names do not reach below the second image.
    drawn = np.flatnonzero((sheet("日本語" * 30) != sheet("")).any(axis=0))
    assert 150 < drawn.max() < sheet("").shape[1] / 2
    rare = "\ue000"  # of these fonts, one has it
    assert (sheet(rare) != sheet(rare, "no such font", "STIXNonUnicode")).any()
    assert not caplog.records


def test_a_run_with_many_labels_gives_each_class_by_itself(multilabel_run, folder, capsys):
    run("--weights", multilabel_run, folder / "0.png", "--top", 10, "--json")
    (best,) = [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]
    assert [p["probability"] for p in best] == [0.5] * 10
    assert {"Bag", "Ankle boot"} < {p["name"] for p in best}


def test_each_class_by_itself_where_it_is_asked_for(weights, folder, capsys):
    """The same logits through a sigmoid instead of a softmax: a network does not know what its head was trained for."""
    found = []
    for option in ([], ["--sigmoid"]):
        run("--weights", weights, folder / "0.png", "--top", 5, "--json", *option)
        found.append(json.loads(capsys.readouterr().out)["predictions"])
    shares, alone = (np.array([p["probability"] for p in best]) for best in found)
    assert [p["class"] for p in found[0]] == [p["class"] for p in found[1]]
    np.testing.assert_allclose(np.diff(np.log(alone / (1 - alone))), np.diff(np.log(shares)), rtol=1e-3)
    assert alone.sum() > 1 > shares.sum()


def test_a_weight_file_knows_too_that_it_has_many_labels(multilabel_run, folder, tmp_path, capsys):
    save_network(tmp_path / "x.safetensors", open_network(str(multilabel_run)))
    run("--weights", tmp_path / "x.safetensors", folder / "0.png", "--top", 10, "--json")
    (best,) = [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]
    assert [p["probability"] for p in best] == [0.5] * 10


def test_the_words_of_imagenet_are_of_its_classes_and_differ():
    words = imagenet_classes.class_words()
    assert list(words) == imagenet_classes.class_names()
    assert len(set(words.values())) == 1000
    assert (words["n01440764"], words["n15075141"]) == ("tench", "toilet tissue")


def test_a_single_logit_gives_both_classes(network, folder, tmp_path, capsys):
    model = network.model.replace(num_classes=1)
    head = network.variables["params"]["head"]["predictions"]
    one = {"predictions": {"kernel": head["kernel"][:, :1], "bias": head["bias"][:1]}}
    variables = network.variables | {"params": network.variables["params"] | {"head": one}}
    path = tmp_path / "one.safetensors"
    save_network(path, dataclasses.replace(network, model=model, variables=variables, classes=("cat", "dog")))
    assert run("--weights", path, folder, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run("--weights", path, folder, "--json", "--sigmoid") == 0  # its probability is that of a sigmoid already
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    for of_image in [line["predictions"] for line in lines]:
        assert {guess["name"] for guess in of_image} == {"cat", "dog"}
        assert sum(guess["probability"] for guess in of_image) == pytest.approx(1)
        assert of_image[0]["probability"] >= 0.5


SURE = np.array([[30.0, 40.0, 20.0, -5.0], [-3.0, 2.0, 1.0, 50.0]], np.float32)
"""Logits of which several have the probability 1 in float32."""


def test_classes_are_ranked_by_logits_where_probabilities_are_equal(network):
    many = dataclasses.replace(network, multi_label=True)
    classes, probabilities = predict.most_probable(many, jnp.asarray(SURE), 3)
    np.testing.assert_array_equal(classes, [[1, 0, 2], [3, 1, 2]])
    np.testing.assert_array_equal(probabilities[0], [1, 1, 1])


class Logits(nn.Module):
    """Takes logits as images, of one pixel."""

    @nn.compact
    def __call__(self, x, train):
        return x[:, 0, 0], {}


def test_an_evaluation_ranks_by_logits_too():
    config = override(resolve(multilabel.get_config()), {"model.num_classes": 4, "evaluation.map_at": 3})
    batch = {
        "image": jnp.asarray(SURE)[:, None, None],
        "label": jnp.eye(4)[:2],
        "mask": jnp.ones(2, bool),
        "damaged": jnp.zeros(2, bool),
    }
    _, found = make_evaluation_step(Logits(), config)({}, batch)
    np.testing.assert_array_equal(found["classes"], [[1, 0, 2], [3, 1, 2]])


@pytest.mark.parametrize("multi_label", [False, True])
def test_equal_classes_count_against_the_network_in_predictions_as_in_metrics(multi_label):
    config = resolve((multilabel if multi_label else fashion_mnist).get_config())
    config = override(config, {"model.num_classes": 4, "evaluation.map_at": 4})
    logits = np.array([[1, 1, 1, 1], [0, 2, 2, 1], [0, 1, 3, 2], [np.nan, 0, 0, 9]], np.float32)
    label = np.array([0, 1, 2, 3])
    batch = {
        "image": jnp.asarray(logits)[:, None, None],
        "label": jnp.eye(4)[label] if multi_label else jnp.asarray(label),
        "mask": jnp.ones(4, bool),
        "damaged": jnp.zeros(4, bool),
    }
    states, found = make_evaluation_step(Logits(), config)({}, batch)
    np.testing.assert_array_equal(found["classes"][:3], [[1, 2, 3, 0], [2, 1, 3, 0], [2, 3, 1, 0]])
    predictions = Predictions(np.arange(4), *(np.asarray(found[k]) for k in ("label", "classes", "probabilities")))
    np.testing.assert_array_equal(predictions.right, [False, False, True, False])
    if not multi_label:
        assert states["top1"]["total"] == 1


def test_damaged_images_are_left_out_of_metrics_and_predictions():
    """The loader gives them the image and the label of their neighbour, which would count twice."""
    config = override(resolve(fashion_mnist.get_config()), {"model.num_classes": 4})
    batch = {
        "image": np.eye(4, dtype=np.float32)[[0, 0, 2, 3]][:, None, None],
        "label": np.array([0, 0, 1, 3]),
        "index": np.array([0, 1, 2, -1]),
        "damaged": np.array([True, False, False, False]),
        "mask": np.array([True, True, True, False]),
    }

    def run(damaged):
        batches = [batch | {"damaged": np.array(damaged)}]
        metrics = metrics_of(config)
        step = make_evaluation_step(Logits(), config)
        return evaluate(step, metrics, {"": {}}, batches, 3, to_devices=lambda batch: jax.tree.map(jnp.asarray, batch))

    values, predictions = run([True, False, False, False])
    assert (values["count"], values["damaged"], values["top1"]) == (2, 1, 0.5)
    np.testing.assert_array_equal(predictions.index, [1, 2])
    np.testing.assert_array_equal(predictions.right, [True, False])
    values, predictions = run([False, False, False, False])
    assert (values["count"], values["damaged"], values["top1"]) == (3, 0, pytest.approx(2 / 3))


def test_what_is_no_regular_file_is_named(weights, tmp_path, capsys):
    Image.fromarray(photographs()[0]).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadDataError, match="2 of 3 images cannot be read, all others were predicted"):
        run("--weights", weights, tmp_path, "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in entry for entry in found] == [False, True, True]
    with pytest.raises(BadDataError, match="1 of 1 images"):
        run("--weights", weights, tmp_path / "pipe.jpg")


def test_limits_can_be_raised(weights, tmp_path, capsys):
    Image.fromarray(photographs()[0]).save(tmp_path / "a.png")
    pixels = photographs()[0].shape[0] * photographs()[0].shape[1]
    with pytest.raises(BadDataError, match="1 of 1 images cannot be read") as error:
        run("--weights", weights, tmp_path / "a.png", "--max_pixels", pixels - 1)
    assert "--max_pixels" in error.value.fix
    assert f"above max_pixels={pixels - 1:,}" in capsys.readouterr().err
    assert run("--weights", weights, tmp_path / "a.png", "--max_pixels", pixels) == 0


def test_a_contact_sheet_does_not_replace_an_image(weights, tmp_path):
    Image.fromarray(photographs()[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    for sheet in ("a.png", "b.png"):
        with pytest.raises(UsageError, match="would overwrite an input"):
            run("--weights", weights, tmp_path / "a.png", "--contact_sheet", tmp_path / sheet)
    assert (tmp_path / "a.png").read_bytes() == before
