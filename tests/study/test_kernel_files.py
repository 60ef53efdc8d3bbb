"""Regular kernels in weight files of networks that this package does not have."""

from __future__ import annotations

import json
import re
import sys

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.study import kernel_files
from tests.study.kernel_files import REGULAR, across, flax_file, keras_file, random, torch_file, within
from xception_jax.cli import main, parse
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.study.kernels.measure import first_component
from xception_jax.study.kernels.networks import analyse
from xception_jax.study.kernels.weight_file import AXES

FEW = {"conv1": (3, 3, 5, 5), "conv2": (3, 3, 5, 5)}  # all of whose sides could be sides of a kernel


def test_a_file_of_pytorch(tmp_path):
    kernels = torch_file(tmp_path / "resnet.safetensors")
    report = analyse(tmp_path / "resnet.safetensors")
    assert [layer.layer for layer in report.layers] == [f"{name}.weight" for name in REGULAR]
    for layer in report.layers:
        kernel = kernels[layer.layer].astype(np.float64)
        assert layer.shape == kernel.shape
        assert layer.first_component == pytest.approx(first_component(kernel).mean(), rel=1e-6)
        assert layer.position("within") == pytest.approx(1, abs=0.25)  # random
        assert len(layer.rank_errors) == kernel.shape[0] * kernel.shape[1]
    (axes,) = report.axes.values()
    assert axes.startswith("oihw, in which 10 of 10 tensors")
    (left_out,) = report.left_out.values()
    assert {reason: len(names) for reason, names in left_out.items()} == {
        "1 x 1": 4, "grouped": 1, "depthwise or with one input channel": 1,
    }  # fmt: skip
    assert left_out["grouped"] == ("layer2.0.conv2.weight",)


@pytest.mark.parametrize(
    ("channels_and_filters", "grouped"),
    [
        # as AlexNet, whose halves of the channels are on two GPUs
        ({"conv1": (3, 12), "conv2": (6, 32), "conv3": (32, 48), "conv4": (24, 48)}, ["conv2", "conv4"]),
        # halves the map in layers whose names come last
        ({"conv16_1": (16, 16), "conv32_1": (32, 32), "conv32_down": (16, 32)}, []),
        # splits its channels in two, and convolves one of them
        ({"conv1": (3, 16), "conv2": (16, 32), "half1": (16, 16), "half2": (16, 16)}, []),
        # a second half that no kernel produces, but the kernel itself
        ({"conv1": (3, 32), "conv2": (16, 16)}, ["conv2"]),
    ],
)
def test_a_kernel_that_reads_a_part_of_the_channels_is_grouped(channels_and_filters, grouped, tmp_path):
    rng = np.random.default_rng(0)
    kernels = {
        f"{name}.weight": rng.normal(size=(filters, channels, 3, 3)).astype(np.float32)
        for name, (channels, filters) in channels_and_filters.items()
    }
    save_file(kernels, tmp_path / "net.safetensors")
    (left_out,) = analyse(tmp_path / "net.safetensors").left_out.values()
    assert left_out.get("grouped", ()) == tuple(f"{name}.weight" for name in grouped)


@pytest.mark.parametrize("write", [torch_file, flax_file])
@pytest.mark.parametrize("make", [within, across])
def test_separable_kernels_are_found_exactly(tmp_path, write, make):
    write(tmp_path / "net.safetensors", make)
    layers = analyse(tmp_path / "net.safetensors").layers
    assert len(layers) == len(REGULAR)
    for layer in layers:
        own, other = (layer.within, layer.across) if make is within else (layer.across, layer.within)
        assert own < 1e-12  # float32 rounds each number
        assert other > 0.2
        if make is within:
            assert layer.first_component == pytest.approx(1, abs=1e-12)
        else:
            assert layer.rank_errors[0] < 1e-6


def test_axes_of_keras_are_known(tmp_path):
    layers = keras_file(tmp_path / "net.h5")
    report = analyse(tmp_path / "net.h5")
    assert [layer.layer.rpartition("/")[0].rpartition("/")[2] for layer in report.layers] == [
        "block1_conv1",
        "block1_conv2",
    ]
    assert report.layers[1].shape == layers["block1_conv2"]["kernel:0"].shape
    assert report.axes["net.h5"] == "hwio, as in all files of Keras"
    assert {len(names) for names in report.left_out["net.h5"].values()} == {1, 2}  # pointwise, two depthwise


def test_a_tree_of_keras(tmp_path):
    rng = np.random.default_rng(0)
    kernels = {"conv2d": (3, 3, 3, 8), "conv2d_1": (3, 3, 8, 8), "depthwise_conv2d": (3, 3, 8, 2)}
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        for name, shape in kernels.items():
            file[f"layers/{name}/vars/0"] = random(rng, shape).astype(np.float32)
            file[f"layers/{name}/vars/1"] = np.zeros(shape[3], np.float32)
    report = analyse(tmp_path / "net.weights.h5")
    assert [layer.layer for layer in report.layers] == ["layers/conv2d/0", "layers/conv2d_1/0"]
    assert list(report.left_out["net.weights.h5"].values()) == [("layers/depthwise_conv2d/0",)]


def test_vectors_beside_the_kernels_tell_the_axes(tmp_path):
    """Shapes alone allow all orders here, and the names are those of nobody."""
    rng = np.random.default_rng(0)
    for order, permutation in (("oihw", (3, 2, 0, 1)), ("hwio", (0, 1, 2, 3))):
        tensors = {}
        for name, shape in FEW.items():
            tensors[f"{name}.taps"] = np.ascontiguousarray(random(rng, shape).transpose(permutation))
            tensors[f"{name}.offset"] = np.zeros(shape[3])
        save_file(tensors, tmp_path / f"{order}.safetensors")
        report = analyse(tmp_path / f"{order}.safetensors")
        assert re.match(f"{order}, because the biases of their layers", report.axes[f"{order}.safetensors"])
        assert [layer.shape for layer in report.layers] == list(FEW.values())


def test_names_tell_the_axes(tmp_path):
    rng = np.random.default_rng(0)
    save_file({"c.weight": rng.normal(size=(3, 3, 3, 3))}, tmp_path / "net.safetensors")
    (axes,) = analyse(tmp_path / "net.safetensors").axes.values()
    assert axes.startswith("oihw, because they are named like that")


def test_unclear_axes_are_asked_for(tmp_path):
    kernel = random(np.random.default_rng(0), (3, 3, 5, 5))
    save_file({"a": kernel}, tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match="not clear: all 1 kernels can be hwio or oihw") as caught:
        analyse(tmp_path / "net.safetensors")
    assert caught.value.fix == "set --axes to one of hwio, oihw"
    report = analyse(tmp_path / "net.safetensors", "hwio")
    assert report.layers[0].shape == (3, 3, 5, 5)
    assert report.axes["net.safetensors"] == "hwio, as --axes says"


def test_tensors_that_are_no_kernels(tmp_path):
    rng = np.random.default_rng(0)
    extra = {
        "pos_embed": np.ones((1, 40, 40, 30), np.float32),
        "quantized.weight": np.ones((8, 8, 3, 3), np.int8),
        "dead.weight": np.zeros((8, 8, 3, 3), np.float32),
        "empty.weight": np.zeros((0, 8, 3, 3), np.float32),
        "huge.weight": rng.normal(size=(8, 8, 3, 3)) * 1e300,  # its squares overflow
        "tiny.weight": rng.normal(size=(8, 8, 3, 3)) * 1e-300,
        "half.weight": rng.normal(size=(8, 8, 3, 3)).astype(np.float16),
    }
    torch_file(tmp_path / "net.safetensors", extra=extra)
    report = analyse(tmp_path / "net.safetensors")
    names = [layer.layer for layer in report.layers]
    assert set(names) == {f"{name}.weight" for name in [*REGULAR, "huge", "tiny", "half"]}
    assert all(0.5 < layer.within < 0.9 for layer in report.layers if layer.layer[:4] in ("huge", "tiny", "half"))
    left_out = report.left_out["net.safetensors"]
    assert left_out["not floating-point"] == ("quantized.weight",)
    assert left_out["zero"] == ("dead.weight",)
    assert left_out["neither a square nor a line of at most 16 pixels"] == ("pos_embed",)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path, bad):
    kernel = np.ones((8, 8, 3, 3), np.float32)
    kernel[3, 2, 1, 0] = bad
    torch_file(tmp_path / "net.safetensors", extra={"bad.weight": kernel})
    with pytest.raises(BadDataError, match=r"bad\.weight holds non-finite values"):
        analyse(tmp_path / "net.safetensors")


def test_a_file_without_regular_kernels(tmp_path):
    save_file({"fc.weight": np.ones((4, 4), np.float32)}, tmp_path / "dense.safetensors")
    with pytest.raises(InputMissingError, match="no tensor with four axes"):
        analyse(tmp_path / "dense.safetensors")
    torch_file(tmp_path / "net.safetensors", layers={"conv": (1, 1, 20, 20)})
    with pytest.raises(InputMissingError, match=r"no trained network .* \(1 1 x 1 are left out\)"):
        analyse(tmp_path / "net.safetensors")


def test_a_kernel_whose_energies_leave_no_choice(tmp_path):
    """Only one tap is not zero, so that every kernel with these energies is separable."""
    kernel = np.zeros((8, 8, 3, 3), np.float32)
    kernel[:, :, 1, 1] = np.random.default_rng(0).normal(size=(8, 8))
    torch_file(tmp_path / "net.safetensors", layers={"one": (3, 3, 20, 20)}, extra={"point.weight": kernel})
    point = next(layer for layer in analyse(tmp_path / "net.safetensors").layers if layer.layer == "point.weight")
    assert point.within < 1e-20
    assert point.to_json()["position_within"] is None


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["xception-jax", "study", "kernels", *map(str, arguments)])
    return main()


def test_the_command(tmp_path, capsys, monkeypatch):
    name = "conv\x1b[31m\n=evil"
    file = tmp_path / "net.safetensors"
    torch_file(file, layers={name: (3, 3, 20, 24), **kernel_files.BOTTLENECK})
    assert run(monkeypatch, file) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"conv\x1b[31m\n=evil" in out
    squares, lines = out.split("kernels that are a line of pixels")
    assert "3x3x6x6" in squares
    assert "1x7x16x12" in lines
    assert "1x7x16x12" not in squares
    assert "left out: 4 1 x 1, 1 grouped, 1 depthwise" in out
    assert run(monkeypatch, file, "--axes", "oihw", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == len(REGULAR) + 1


def test_every_order_of_axes_can_be_given():
    for order in AXES:
        assert parse(["study", "kernels", "x", "--axes", order]).axes == order
    with pytest.raises(UsageError):
        parse(["study", "kernels", "x", "--axes", "chwn"])


def test_a_hostile_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "net.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{")
    with pytest.raises(BadDataError) as caught:
        run(monkeypatch, tmp_path / "net.safetensors")
    assert caught.value.exit_code == 65
