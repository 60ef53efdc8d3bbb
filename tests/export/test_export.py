"""Exports of every kind of network, loaded as their readers load them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import sklearn.datasets

from tests.conftest import run_command
from tests.models.random_weights import random_variables
from xception_jax.cli import COMMANDS
from xception_jax.cli import export as command
from xception_jax.config import default_config, override, resolve
from xception_jax.data.images import central_view
from xception_jax.data.turn import Turn
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.export.card import as_markdown, make_card, read_evaluation
from xception_jax.export.check import Difference
from xception_jax.export.formats import PLATFORMS, to_stablehlo, write_network
from xception_jax.export.inference import (
    compile_inference,
    fold_batch_norm,
    in_float32,
    make_inference,
    make_reference,
    scaling,
)
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.models import create_model
from xception_jax.ops import cpu_kernels
from xception_jax.weights import Network, Preprocessing, load_network, save_network

onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"num_classes": 5, "width_multiplier": 0.1, "middle_blocks": 0}
VARIANTS = {
    "figure 5": {},
    "segments": {"segments": 2, "batch_norm.scale": False, "padding": "symmetric"},
    "small segments": {"segments": 8, "width_multiplier": 0.25},
    "pointwise first": {
        "order": "pointwise_first",
        "intermediate_activation": "elu",
        "depth_multiplier": 2,
        "group_width": 4,
        "stem": "small",
    },
    "relu between": {
        "intermediate_activation": "relu",
        "residual": False,
        "kernel_size": 5,
        "depth_multiplier": 2,
        "fc_layers": 2,
        "fc_width": 16,
        "batch_norm.epsilon": 1e-5,
    },
    "fields of studies": {
        "group_width": "all",
        "intermediate_batch_norm": True,
        "intermediate_activation": "scaled_elu",
        "stem_width": 4,
        "head_width": 20,
        "strides": (1, 2, 2, 1),
    },
    "inception module": {"module": "inception", "dtype": "bfloat16", "batch_norm.statistics": "device"},
    "regular convolutions": {"module": "regular", "initialization": "variance_preserving"},
    "inception_v3": {"name": "inception_v3", "aux_head": True, "middle_blocks": 8},
    "inception_v3_2016": {"name": "inception_v3_2016", "middle_blocks": 8, "padding": "symmetric"},
}


def test_a_network_of_turned_images_is_exported_only_with_its_turn(tmp_path):
    network = make_network({"stem": "module"}, size=72)
    view = dataclasses.replace(network.preprocessing, turn=Turn("free", 0.5, 3))
    network = dataclasses.replace(network, preprocessing=view)
    for format in ("stablehlo", "onnx"):
        with pytest.raises(UsageError, match="trained on turned images"):
            write_network(network, tmp_path / "file", format)
    write_network(network, tmp_path / "file.safetensors", "safetensors")
    assert load_network(tmp_path / "file.safetensors").preprocessing == view
    card = make_card(network, "x", "safetensors", "0", uint8=False, evaluation=None, difference=None)
    assert "Last: turned (free, angle 0.5, seed 3" in as_markdown(card)


@functools.cache
def variant_network(name: str) -> Network:
    return make_network(VARIANTS[name])


def make_network(fields: dict, size: int = 0) -> Network:
    fields = {f"model.{name}": value for name, value in (SMALL | fields).items()}
    model = override(resolve(default_config()), fields).model
    size = size or (71 if model.name == "xception" else 139)
    variables = random_variables(create_model(model), jnp.zeros((1, size, size, 3)))
    preprocessing = Preprocessing(size=size, crop=0.9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    classes = tuple("abcde"[: model.num_classes])
    return Network(model, jax.tree.map(np.asarray, variables), preprocessing, classes, "a test", "0" * 64)


def photographs(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Returns photographs as pixels of 0 to 255, and as the network takes them."""
    files = [skimage.data.astronaut(), skimage.data.cat(), *sklearn.datasets.load_sample_images().images]
    preprocessing = network.preprocessing
    pixels = np.stack([central_view(image, preprocessing.size, preprocessing.crop) for image in files])
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    return pixels, (pixels.astype(np.float32) / 255 - mean) / std


def expected_logits(network: Network, images: np.ndarray) -> np.ndarray:
    before = network.model.dtype
    network, original = in_float32(network), network
    assert original.model.dtype == before
    model = create_model(network.model)
    return np.asarray(jax.jit(model.apply)(network.variables, images)[0])


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    network = variant_network(request.param)
    pixels, images = photographs(network)
    return network, pixels, images, expected_logits(network, images)


@pytest.mark.slow
def test_compiled_inference_computes_the_same(variant):
    network, _, images, expected = variant
    infer = compile_inference(network)
    assert_close(infer(images), expected)
    assert_close(infer(images[:1]), expected[:1])


@pytest.mark.skipif(not cpu_kernels.folded_available(), reason="needs a C++ compiler and a CPU as the only device")
@pytest.mark.parametrize(
    ("variant", "folded", "depthwise"),
    # Two convolutions of the stem, four shortcuts, ten separable ones: in one pass if the segments have at most 8
    # channels, and no ReLU keeps the two apart.
    [
        ("figure 5", 2 + 4 + 10, 0),
        ("segments", 2 + 4 + 3 + 2 * 7, 0),
        ("small segments", 2 + 4 + 5 + 2 * 5, 0),
        ("relu between", 2 + 2 * 10, 0),
    ],
)
def test_compiled_inference_has_few_passes(variant, folded, depthwise):
    network = variant_network(variant)
    size = network.preprocessing.size
    images = jnp.zeros((2, size, size, 3))
    text = jax.jit(compile_inference(network)).lower(images).as_text()
    assert len(re.findall(r"custom_call @folded_conv", text)) == folded
    assert len(re.findall(r"custom_call @depthwise", text)) == depthwise
    assert ("stablehlo.maximum" in text) == (variant != "figure 5")


def test_compiled_inference_lets_nan_through():
    network = variant_network("figure 5")
    images = np.zeros((1, 71, 71, 3), np.float32)
    images[0, 40, 40] = np.nan
    assert np.isnan(compile_inference(network)(images)).all()


def run_onnx(content: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def test_every_network_as_onnx(variant):
    import onnx

    from xception_jax.export.onnx_graph import to_onnx

    network, pixels, images, expected = variant
    content = to_onnx(network)
    for batch in (slice(0, 4), slice(2, 3)):
        assert_close(run_onnx(content, images[batch]), expected[batch])
    if network.model.name == "xception":
        assert_close(run_onnx(to_onnx(network, uint8=True), pixels), expected)
    # One convolution for each of ours, whatever its segments, and nothing that turns activations round in between.
    operations = [node.op_type for node in onnx.load_from_string(content).graph.node]
    convolutions = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(in_float32(network).variables["params"])
        if leaf.ndim == 4
    ]
    assert operations.count("Conv") == len(convolutions)
    assert operations.count("Transpose") == 1
    assert not {"Sqrt", "Reciprocal", "BatchNormalization", "Einsum", "If"} & set(operations)


def test_batch_norm_stays_only_where_no_convolution_precedes_it():
    def kept_and_all(name):
        network = in_float32(variant_network(name))
        _, affine = fold_batch_norm(create_model(network.model), network.variables, network.preprocessing.size)
        return {name for name, (factor, _) in affine.items() if factor is not None}, set(affine)

    assert kept_and_all("pointwise first")[0] == set()
    kept, norms = kept_and_all("inception module")
    assert kept == {name for name in norms if re.fullmatch(r"block\d+_sepconv\d_bn", name)}
    assert kept < norms
    kept, norms = kept_and_all("inception_v3_2016")
    assert kept == norms


def test_stablehlo_is_portable_and_computes_the_same():
    """With segments, because each platform has another lowering for them; figure 5 is exported below."""
    network = variant_network("segments")
    pixels, images = photographs(network)
    content = to_stablehlo(network, uint8=True)
    assert b"conv.py" not in content  # nor any other file of this machine
    exported = jax.export.deserialize(bytearray(content))
    assert exported.platforms == PLATFORMS
    assert set(re.findall(r"custom_call @(\w+)", exported.mlir_module())) <= {"shape_assertion"}
    assert_close(jax.jit(exported.call)(pixels), expected_logits(network, images))


def test_folding_extreme_statistics():
    """Dead channels (variance 0), a gamma of 0 or below, large means: what a trained network has."""
    network = variant_network("figure 5")
    rng = np.random.default_rng(1)

    def change(path, leaf):
        name, leaf = path[-1].key, leaf.copy()
        if name == "var":
            leaf[: len(leaf) // 4] = 0
            leaf[-1] = 1e6
        if name == "scale":
            leaf[::3] *= -1
            leaf[1] = 0
        return leaf + rng.normal(0, 3, leaf.shape).astype(np.float32) if name == "mean" else leaf

    variables = jax.tree_util.tree_map_with_path(change, network.variables)
    network = Network(network.model, variables, network.preprocessing, None, "", "")
    _, images = photographs(network)
    expected = np.asarray(jax.jit(make_reference(network))(images))
    assert np.isfinite(expected).all()
    assert_close(jax.jit(make_inference(network))(images), expected)


def test_scaling_is_that_of_training():
    scale, shift = scaling(Preprocessing())
    np.testing.assert_array_equal(np.stack([scale, shift]), np.float32([[2 / 255] * 3, [-1] * 3]))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(path, variant_network("figure 5"))
    return path


@pytest.fixture(scope="module")
def evaluation(weights):
    path = weights.with_name("evaluation.json")
    metrics = {"dataset": "flowers", "split": "test", "count": 1000, "top1": 0.75, "top5": 0.9, "per_class": []}
    path.write_text(json.dumps(metrics | {"sha256": load_network(weights).sha256}))
    return path


def export(*arguments: object) -> int:
    assert command.__name__.removeprefix("xception_jax.cli.") in COMMANDS
    return run_command(command, *arguments)


@pytest.fixture(scope="module")
def exports(weights, evaluation, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports")
    for format, more in (("stablehlo", ["--uint8"]), ("onnx", []), ("safetensors", [])):
        assert export(weights, directory, "--format", format, "--evaluation", evaluation, *more) == 0
    return directory


@pytest.mark.slow
def test_what_lies_beside_an_export(exports, weights):
    for format in ("stablehlo", "onnx", "safetensors"):
        file = exports / f"xception.{format}"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        subprocess.run(["sha256sum", "--check", "--status", f"{file}.sha256"], cwd=exports, check=True)
        card = json.loads((exports / f"xception.{format}.json").read_text())
        markdown = (exports / f"xception.{format}.md").read_text()
        assert (card["sha256"], card["source"]) == (digest, str(weights))
        assert digest in markdown
        network = load_network(weights)
        assert card["source_sha256"] == network.sha256
        assert card["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
        assert f"{card['parameters']:,} parameters" in markdown
        assert card["classes"] == list("abcde")
        assert card["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
        assert card["evaluation"]["top1_interval"] == pytest.approx(wilson_interval(0.75, 1000))
        assert "top-1 accuracy 0.7500 (95 % interval 0.7222 to 0.7758)" in markdown
        assert "1,000 images of `flowers` `test`" in markdown
        assert 0 <= card["check"]["largest"] <= 1e-5 * max(1, card["check"]["logits"])
        assert not list(exports.glob(".*"))


def test_a_card_says_how_the_image_is_cut():
    network = variant_network("figure 5")

    def text(**fields):
        preprocessing = dataclasses.replace(network.preprocessing, **fields)
        given = dataclasses.replace(network, preprocessing=preprocessing)
        return as_markdown(make_card(given, "x", "onnx", "0", uint8=False, evaluation=None, difference=None))

    assert "The central 0.9 of each side, resized to 71 x 71 (bilinear)." in text()
    assert "The shorter side resized to 79 (antialiased_bicubic), then the central 71 x 71. Then:" in text(
        crop=0.8975, interpolation="antialiased_bicubic"
    )


def test_the_lines_of_a_card_run(exports):
    """In one process without this package, and where the file is."""
    script = []
    for format in ("onnx", "stablehlo"):
        (block,) = re.findall(r"```python\n(.*?)```", (exports / f"xception.{format}.md").read_text(), re.DOTALL)
        assert len([line for line in block.splitlines() if line]) <= 6
        script.append(block + "print(np.asarray(logits).shape)\n")
    environment = os.environ | {"PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(script) + "import sys; assert 'xception_jax' not in sys.modules"],
        cwd=exports,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[:2] == ["(1, 5)", "(1, 5)"]


def test_weights_come_back_as_they_were(exports, weights):
    before, after = load_network(weights), load_network(exports / "xception.safetensors")
    jax.tree.map(np.testing.assert_array_equal, before.variables, after.variables)
    assert (before.preprocessing, before.classes) == (after.preprocessing, after.classes)


def test_a_damaged_export_is_found(exports, weights, tmp_path):
    source = exports / "xception.onnx"
    file = tmp_path / "damaged.onnx"
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    digest = (exports / "xception.onnx.sha256").read_text()
    (tmp_path / "damaged.onnx.sha256").write_text(digest)
    with pytest.raises(BadDataError, match="damaged"):
        export(weights, file, "--format", "onnx", "--check_only")
    file.write_bytes(content[:1000])
    (tmp_path / "damaged.onnx.sha256").write_text(hashlib.sha256(content[:1000]).hexdigest())
    with pytest.raises(BadDataError, match="cannot be run"):
        export(weights, file, "--format", "onnx", "--check_only")


def test_an_export_of_another_network_is_found(weights, tmp_path):
    save_network(tmp_path / "other.safetensors", make_network({"batch_norm.epsilon": 0.01}))
    export(tmp_path / "other.safetensors", tmp_path / "other.onnx", "--format", "onnx", "--no_check")
    with pytest.raises(BadDataError, match="differs"):
        export(weights, tmp_path / "other.onnx", "--format", "onnx", "--check_only")
    save_network(tmp_path / "fewer.safetensors", make_network({"num_classes": 3}))
    with pytest.raises(BadDataError, match="logits, and the network 3"):
        export(tmp_path / "fewer.safetensors", tmp_path / "other.onnx", "--format", "onnx", "--check_only")


def test_what_fails_the_check_leaves_no_file(tmp_path):
    """Finite weights whose logits are not: the network is of no use, and its export would be of none."""
    network = make_network({})
    network.variables["params"]["head"]["predictions"]["kernel"] = np.full_like(
        network.variables["params"]["head"]["predictions"]["kernel"], 3e38
    )
    save_network(tmp_path / "huge.safetensors", network)
    with pytest.raises(BadDataError, match="not finite"):
        export(tmp_path / "huge.safetensors", tmp_path / "out.onnx", "--format", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["huge.safetensors"]


@pytest.mark.parametrize(
    "output", [lambda x: x.sum(), lambda x: jnp.zeros((1, 4)), lambda x: x[:, :2, 0, 0].astype(int)]
)
def test_an_export_that_gives_no_logits_is_named(output, weights, tmp_path):
    size = load_network(weights).preprocessing.size
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    content = jax.export.export(jax.jit(output), platforms=["cpu"])(images).serialize()
    (tmp_path / "x.stablehlo").write_bytes(content)
    (tmp_path / "x.stablehlo.sha256").write_text(hashlib.sha256(content).hexdigest())
    with pytest.raises(BadDataError, match="output of the export cannot be read"):
        export(weights, tmp_path / "x.stablehlo", "--format", "stablehlo", "--check_only")


def test_an_export_replaces_nothing_that_it_reads(weights, evaluation, tmp_path):
    beside = tmp_path / "x.onnx.json"
    beside.write_bytes(evaluation.read_bytes())
    with pytest.raises(UsageError, match="would overwrite an input"):
        export(weights, tmp_path / "x.onnx", "--format", "onnx", "--evaluation", beside)
    assert beside.read_bytes() == evaluation.read_bytes()
    (tmp_path / "file").write_text("mine")
    for out in ("x.stablehlo", "file"):
        with pytest.raises(UsageError, match=r"does not end in \.onnx"):
            export(weights, tmp_path / out, "--format", "onnx")


def test_what_is_refused(weights, evaluation, tmp_path):
    with pytest.raises(UsageError, match="safetensors hold weights"):
        export(weights, tmp_path, "--format", "safetensors", "--uint8")
    with pytest.raises(InputMissingError):
        export(tmp_path / "none", tmp_path, "--format", "onnx")
    with pytest.raises(InputMissingError, match="no export"):
        export(weights, tmp_path, "--format", "onnx", "--check_only")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(evaluation.read_text()) | {"sha256": "f" * 64}))
    for content, match in ((other.read_text(), "another network"), ("[]", "cannot be read"), ("{", "cannot be read")):
        other.write_text(content)
        with pytest.raises(BadDataError, match=match):
            export(weights, tmp_path / "x.onnx", "--format", "onnx", "--evaluation", other)
    good = json.loads(evaluation.read_text())
    other.write_text(json.dumps(good | {"judgement": {"groups": 20}}))  # whose images are not independent
    assert {"top1", "top5"} == {name for name in read_evaluation(other, load_network(weights)) if "top" in name}
    for name, value in (
        ("count", "1000"),
        ("count", 1000.5),
        ("count", True),
        ("count", -1),
        ("count", 10**400),
        ("count", None),
        ("top1", "0.75"),
        ("top1", 10**400),
        ("top5", 1.5),
        ("dataset", ["flowers"]),
        ("step", "last"),
    ):
        other.write_text(json.dumps(good | {name: value}))
        with pytest.raises(BadDataError, match="cannot be read"):
            read_evaluation(other, load_network(weights))
    headless = load_network(weights)
    del headless.variables["params"]["head"]
    save_network(tmp_path / "headless.safetensors", headless)
    with pytest.raises(BadDataError, match="no classifier"):
        export(tmp_path / "headless.safetensors", tmp_path, "--format", "onnx")


@pytest.mark.parametrize(
    ("largest", "logits", "accepted"),
    [(0.9e-5, 0.5, True), (1.1e-5, 0.5, False), (1.9e-5, 2.0, True), (2.1e-5, 2.0, False)],
)
def test_the_tolerance_is_relative_to_large_logits(largest, logits, accepted):
    assert Difference(largest, logits, 4).accepted == accepted
