"""`explain`: pictures, sheets and arrays of maps, for any class and block; mistakes cost three lines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_command
from tests.data.small_imagenet import photograph, photographs
from tests.models.random_weights import random_variables
from xception_jax.cli import explain as command
from xception_jax.config import resolve_model
from xception_jax.data.images import thumbnail
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.explain import pictures, sanity
from xception_jax.explain.endpoints import list_endpoints
from xception_jax.explain.explainer import make_explainer
from xception_jax.explain.options import METHODS
from xception_jax.explain.tiles import heat_maps
from xception_jax.models import create_model
from xception_jax.weights import Network, Preprocessing, save_network

VIEW = Preprocessing(71, 0.8, "antialiased_bilinear", std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def network() -> Network:
    model = resolve_model({"width_multiplier": 0.05, "middle_blocks": 0, "num_classes": 4})
    variables = jax.tree.map(np.array, random_variables(create_model(model), np.zeros((1, 71, 71, 3), np.float32)))
    return Network(model, variables, VIEW, ("Katze", "Hund", "n02084071", "Hund $2"), "", "")


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_network(path, network)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    directory = tmp_path / "photos"
    (directory / "inner").mkdir(parents=True)
    Image.fromarray(photographs()[0]).save(directory / "a.png")
    Image.fromarray(photograph(3)).save(directory / "inner" / "a.png")
    return directory


run = partial(run_command, command)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_photograph_gets_a_picture_and_a_folder_a_sheet(weights, photos, tmp_path, capsys):
    assert run("--weights", weights, photos / "a.png", "--out", tmp_path / "one.png") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{photos}/a.png  ")
    assert err == f"{tmp_path}/one.png: written\n"
    one = pixels(tmp_path / "one.png")
    assert one.shape[1] > 2 * one.shape[0] * 0.75
    run("--weights", weights, photos, "--out", tmp_path / "sheet.png", "--npz", tmp_path / "maps.npz", "--json")
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["name"] for entry in entries] == [
        ("Katze", "Hund", "n02084071", "Hund $2")[e["class"]] for e in entries
    ]
    assert pixels(tmp_path / "sheet.png").shape != one.shape
    with np.load(tmp_path / "maps.npz") as saved:
        assert saved["maps"].shape == (2, 5, 5)
        assert saved["path"].tolist() == [entry["file"] for entry in entries]
        assert str(saved["block"]) == "block4"  # the last with four positions a side
        np.testing.assert_allclose(saved["probability"], [entry["probability"] for entry in entries], rtol=1e-6)


def test_a_map_of_few_positions_is_mentioned(weights, photos, tmp_path, capsys):
    for block, mentioned in (("block6", True), ("block4", False)):
        run("--weights", weights, photos / "a.png", "--out", tmp_path / "one.png", "--block", block)
        assert ("the map of block6 has fewer than 4 positions" in capsys.readouterr().err) == mentioned


@pytest.mark.parametrize(("option", "label"), [("hund", 1), ("N02084071", 2), ("3", 3), ("Hund $2", 3)])
def test_a_class_is_given_by_name_or_number(network, option, label):
    assert command.find_class(option, ["Katze", "Hund", "dog", "Hund $2"], network.classes) == label
    with pytest.raises(UsageError, match="has no class"):
        command.find_class("9" * 5000, ["Katze", "Hund", "dog", "Hund $2"], network.classes)


def test_a_folder_gets_a_picture_of_each_image(weights, photos, tmp_path, capsys):
    options = ["--method", "integrated_gradients", "--steps", 2, "--baseline", "white", "--class", 1]
    run("--weights", weights, photos, "--out", tmp_path / "maps", "--npz", tmp_path / "maps.npz", *options)
    names = ["a_2_integrated_gradients.png", "a_integrated_gradients.png"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names
    out, err = capsys.readouterr()
    assert all(line.endswith("Hund") for line in out.splitlines())
    assert "increase --steps" in err
    with np.load(tmp_path / "maps.npz") as saved:
        assert saved["maps"].shape == (2, 71, 71)
        assert saved["class"].tolist() == [1, 1]


def test_any_block_can_be_asked_for(weights, photos, tmp_path):
    shapes = {}
    for block in ("block1", "block4"):
        run("--weights", weights, photos / "a.png", "--block", block, "--out", tmp_path, "--npz", tmp_path / "m.npz")
        with np.load(tmp_path / "m.npz") as saved:
            shapes[block] = saved["maps"].shape[1:]
    assert shapes == {"block1": (33, 33), "block4": (5, 5)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--steps", "3"], UsageError, "use --method integrated_gradients"),
        (["--method", "integrated_gradients", "--block", "block4"], UsageError, "use --method hires_cam"),
        (["--block", "mixed4"], UsageError, "choose one of block1, block2, block3, block4, block5, block6"),
        (["--class", "hunt"], UsageError, "a name such as 'Hund'"),
        (["--class", "4"], UsageError, "a number from 0 to 3"),
        (["--out", "x.jpg"], UsageError, "ends in .png"),
        (["--out", "no/such/x.png"], InputMissingError, "create the directory"),
        (["--npz", "no/such/x.npz"], InputMissingError, "create the directory"),
        (["--npz", "maps"], UsageError, "ends in .npz"),
        (["--npz", "x.npz", "--sanity"], UsageError, "remove one of them"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(weights, photos, options, error, words):
    with pytest.raises(error) as raised:
        run("--weights", weights, photos, *options)
    assert words in raised.value.fix


def test_a_damaged_image_is_named_and_the_others_explained(weights, photos, tmp_path, capsys):
    (photos / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.raises(BadDataError, match="1 of 3 images cannot be read, all others were explained"):
        run("--weights", weights, photos, "--out", tmp_path / "sheet.png", "--json")
    out, err = capsys.readouterr()
    assert ["error" in json.loads(line) for line in out.splitlines()] == [False, True, False]
    assert err.startswith(f"{photos}/b.jpg: it cannot be decoded")
    assert (tmp_path / "sheet.png").is_file()


def test_a_network_that_rejects_its_only_class_is_explained_as_not(network, photos, tmp_path, capsys):
    model = network.model.replace(num_classes=1)
    variables = jax.tree.map(np.array, random_variables(create_model(model), np.zeros((1, 71, 71, 3), np.float32)))
    variables["params"]["head"]["predictions"]["bias"] -= 100
    path = tmp_path / "one.safetensors"
    save_network(path, dataclasses.replace(network, model=model, variables=variables, classes=("Katze",)))
    run("--weights", path, photos / "a.png", "--out", tmp_path / "x.png", "--json")
    entry = json.loads(capsys.readouterr().out)
    assert entry["name"] == "not Katze"
    assert entry["probability"] > 0.99


def test_the_map_is_painted_where_the_network_looks():
    image = np.full((200, 100, 3), 128, np.uint8)
    heat = np.zeros((10, 10), np.float32)
    heat[0, 0] = 1
    painted = pictures.paint(image, heat, VIEW, METHODS["grad_cam"]).astype(int)
    top, left, height, width = VIEW.visible_box(200, 100)
    rows, columns = np.nonzero(np.ptp(painted, axis=2) > 40)
    assert top - 1 < rows.min()
    assert rows.max() < top + 0.3 * height
    assert left - 1 < columns.min()
    assert columns.max() < left + 0.3 * width
    assert (painted[:5] > 200).all()  # what it does not see is faded
    signed = pictures.paint(image, heat - heat.T[::-1], VIEW, METHODS["hires_cam"]).astype(int)
    red, blue = signed[..., 0] - signed[..., 2], signed[..., 2] - signed[..., 0]
    assert np.unravel_index(red.argmax(), red.shape)[0] < 100 < np.unravel_index(blue.argmax(), blue.shape)[0]


def test_a_map_without_evidence_is_drawn(network):
    image = photograph(0)
    painted = pictures.paint(image, np.zeros((3, 3), np.float32), VIEW, METHODS["grad_cam"])
    assert painted.shape == image.shape
    assert not np.isnan(pictures.display_values(np.full((3, 3), np.nan), METHODS["hires_cam"])).any()


def test_tiles_for_a_report(network):
    images = [photograph(0), photograph(1, 60)]
    tiles = heat_maps(network, images, [1, 2], side=64, batch_size=1)
    assert [tile.shape for tile in tiles] == [(48, 64, 3), (64, 48, 3)]
    together = heat_maps(network, images, [1, 2], side=64)
    others = heat_maps(network, images, [3, 0], side=64)
    for one, same, other in zip(tiles, together, others, strict=True):
        a, b, c = (tile.astype(int) for tile in (one, same, other))
        assert np.abs(a - b).max() <= 1
        assert np.abs(a - c).max() > 10
    assert heat_maps(network, []) == []
    with pytest.raises(ValueError, match="1 classes for 2 images"):
        heat_maps(network, images, [1])


def test_both_classes_of_a_single_logit_have_tiles(network):
    model = network.model.replace(num_classes=1)
    params = network.variables["params"]
    head = {"predictions": {name: leaf[..., :1] for name, leaf in params["head"]["predictions"].items()}}
    variables = network.variables | {"params": params | {"head": head}}
    single = dataclasses.replace(network, model=model, variables=variables, classes=None)
    image = photograph(0)
    (absent,), (present,) = (heat_maps(single, [image], [label], method="hires_cam", side=64) for label in (0, 1))
    plain = thumbnail(image, 64)
    assert np.abs(absent.astype(int) - present).max() > 10
    assert min(np.abs(tile.astype(int) - plain).max() for tile in (absent, present)) > 10


def test_maps_of_a_report_come_from_a_block_with_positions(network):
    small = dataclasses.replace(network, preprocessing=dataclasses.replace(network.preprocessing, size=48))
    image = photograph(0)
    [default] = heat_maps(small, [image])
    create = create_model(small.model)
    _, endpoints = jax.eval_shape(lambda x: create.apply(small.variables, x), np.zeros((1, 48, 48, 3), np.float32))
    sides = {name: value.shape[1] for name, value in endpoints.items() if value.ndim == 4}
    last = [name for name in list_endpoints(create, small.variables, 48) if sides[name] >= 4][-1]
    assert sides["block" + str(len(sides))] < 4
    np.testing.assert_array_equal(default, heat_maps(small, [image], block=last)[0])


def test_the_sanity_check_tells_trained_from_random(network, weights, photos, capsys):
    assert run("--weights", weights, photos, "--sanity", "--method", "hires_cam") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["head", *(f"block{n}" for n in (6, 5, 4, 3, 2, 1))]
    assert lines[-1] in {text for _, text in sanity.VERDICTS}
    run("--weights", weights, photos, "--sanity", "--method", "hires_cam", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(-1 <= row["correlation"] <= 1 for row in rows[:-1])
    # Maps that do not depend on the weights are found out.
    explainer = make_explainer(network, "grad_cam")
    images = np.random.default_rng(0).normal(size=(2, 71, 71, 3)).astype(np.float32)
    fixed = explainer(network.variables, images)
    same = list(sanity.cascade(network, lambda *arguments, **options: fixed, images))
    assert [row.correlation for row in same] == pytest.approx([1] * 7)
    assert "Do not use them" in sanity.verdict(same[-1].correlation)
    assert "constant" in sanity.verdict(float("nan"))


def test_randomizing_shuffles_one_block_after_the_other(network):
    model = create_model(network.model)
    steps = list(sanity.randomize(model, network.variables, 71))
    (_, first), (_, last) = steps[0], steps[-1]
    for path, before in jax.tree_util.tree_leaves_with_path(network.variables):
        after = [network_leaf(variables, path) for variables in (first, last)]
        is_head = path[1].key == "head"
        assert np.array_equal(after[0], before) != is_head or before.size < 5
        assert not np.array_equal(after[1], before) or before.size < 5
        assert np.array_equal(np.sort(after[1], axis=None), np.sort(before, axis=None))


def network_leaf(variables, path):
    for key in path:
        variables = variables[key.key]
    return variables


def test_pictures_do_not_replace_images(weights, photos, tmp_path):
    before = (photos / "a.png").read_bytes()
    with pytest.raises(UsageError, match="contains the input images"):
        run("--weights", weights, photos, "--out", photos)
    with pytest.raises(UsageError, match="would overwrite an input"):
        run("--weights", weights, photos / "a.png", "--out", photos / "a.png")
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.png").symlink_to(photos / "a.png")
    for source in (photos / "a.png", links):  # a picture would be written where the link leads
        with pytest.raises(UsageError, match="contains the input images"):
            run("--weights", weights, source, "--out", links)
    assert (photos / "a.png").read_bytes() == before


def test_another_photograph_of_the_same_name_stays(weights, photos, tmp_path):
    shutil.copyfile(photos / "inner" / "a.png", tmp_path / "a.png")
    run("--weights", weights, photos / "a.png", "--out", tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (photos / "inner" / "a.png").read_bytes()


def test_a_folder_of_pictures_among_the_images_is_not_explained(weights, photos, capsys):
    for _ in range(2):
        assert run("--weights", weights, photos, "--out", photos / "maps") == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
    assert sorted(path.name for path in (photos / "maps").iterdir()) == ["a_2_grad_cam.png", "a_grad_cam.png"]


def test_the_sanity_check_names_damaged_images(weights, photos, capsys):
    (photos / "b.jpg").write_bytes(b"no image")
    with pytest.raises(BadDataError, match="1 of 3 images cannot be read, all others were used"):
        run("--weights", weights, photos, "--sanity")
    out, err = capsys.readouterr()
    assert "2 images" in out
    assert "b.jpg: it cannot be decoded" in err
