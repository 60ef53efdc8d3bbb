from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.small_imagenet import encoded, jpeg, photograph
from xception_jax.data import images

PHOTOGRAPH = photograph(0)


def as_ycck(cmyk: bytes) -> bytes:
    """Declares the channels of a CMYK JPEG to be YCCK, as those of ImageNet's CMYK images are."""
    transform = cmyk.index(b"Adobe") + 11
    return cmyk[:transform] + b"\2" + cmyk[transform + 1 :]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    end = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(jpeg(PHOTOGRAPH))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (jpeg(PHOTOGRAPH), 6),
        (encoded(PHOTOGRAPH, "JPEG", quality=90, progressive=True), 6),
        (encoded(PHOTOGRAPH, "JPEG", "CMYK", quality=95), 6),
        (encoded(PHOTOGRAPH, "PNG"), 0),
        (encoded(PHOTOGRAPH, "PNG", "RGBA"), 0),
        (encoded(PHOTOGRAPH, "PNG", "P"), 60),
        (encoded(PHOTOGRAPH, "WEBP", lossless=True), 0),
        (encoded(PHOTOGRAPH, "WEBP", quality=90), 8),
    ],
)
def test_every_format_gives_the_colors_of_the_photograph(data, tolerance):
    image = images.decode(data)
    assert image.shape == PHOTOGRAPH.shape
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - PHOTOGRAPH).mean() <= tolerance


@pytest.mark.parametrize("transform", [bytes, as_ycck])
def test_cmyk_is_converted_as_pillow_does(transform):
    data = transform(encoded(PHOTOGRAPH, "JPEG", "CMYK"))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(images.decode(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(image_format):
    image = images.decode(encoded(PHOTOGRAPH, image_format, "L"))
    grey = np.asarray(Image.fromarray(PHOTOGRAPH).convert("L"))
    assert image.shape == PHOTOGRAPH.shape
    assert (image == image[..., :1]).all()
    assert np.abs(image[..., 0].astype(int) - grey).mean() < 3


def test_sixteen_bits_become_the_upper_eight():
    grey = np.asarray(Image.fromarray(PHOTOGRAPH).convert("L"))
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 256 + 55).save(buffer, "PNG")
    np.testing.assert_array_equal(images.decode(buffer.getvalue()), np.repeat(grey[..., None], 3, 2))
    color = cv2.imencode(".png", PHOTOGRAPH[..., ::-1].astype(np.uint16) * 256 + 55)[1].tobytes()
    np.testing.assert_array_equal(images.decode(color), PHOTOGRAPH)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    transform = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = images.decode(encoded(PHOTOGRAPH, "JPEG", quality=95, exif=exif))
    np.testing.assert_array_equal(image, transform(images.decode(encoded(PHOTOGRAPH, "JPEG", quality=95))))
    deep = PHOTOGRAPH[..., 0].astype(np.uint16) * 256 + 55  # 16 bits take a way of their own
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(images.decode(buffer.getvalue())[..., 0], transform(PHOTOGRAPH[..., 0]))


def test_exif_is_found_behind_other_segments_and_fill_bytes_only_where_it_is_a_segment():
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = images.decode(encoded(PHOTOGRAPH, "JPEG", quality=95))
    turned = encoded(PHOTOGRAPH, "JPEG", quality=95, exif=exif)
    profile = b"\xff\xe2" + (65_000).to_bytes(2) + bytes(64_998)
    for before in (profile * 3, b"\xff\xff\xff", b"\xff\xfe" + (12).to_bytes(2) + b"\xff\xdaExif\0\0\0\0"):
        np.testing.assert_array_equal(images.decode(turned[:2] + before + turned[2:]), upright[::-1, ::-1])
    comment = b"\xff\xfe" + len(turned).to_bytes(2) + turned[2:]
    plain = encoded(PHOTOGRAPH, "JPEG", quality=95)
    np.testing.assert_array_equal(images.decode(plain[:2] + comment + plain[2:]), upright)


@pytest.mark.parametrize("image_format", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(image_format):
    frames = [Image.fromarray(photograph(number)) for number in (0, 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(images.decode(buffer.getvalue()), PHOTOGRAPH)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"not an image at all",
        b"\x89PNG\r\n\x1a\n",
        encoded(PHOTOGRAPH, "GIF"),
        encoded(PHOTOGRAPH, "BMP"),
        encoded(PHOTOGRAPH, "TIFF"),
        encoded(PHOTOGRAPH, "PNG").replace(b"\x89PNG", b"\x89GNP"),
    ],
    ids=["empty", "magic only", "text", "PNG magic only", "GIF", "BMP", "TIFF", "wrong magic"],
)
def test_other_formats_are_refused(data):
    with pytest.raises(images.DamagedImageError):
        images.decode(data)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "data",
    [
        encoded(PHOTOGRAPH, "JPEG"),
        encoded(PHOTOGRAPH, "JPEG", progressive=True),
        encoded(PHOTOGRAPH, "JPEG", "L"),
        encoded(PHOTOGRAPH, "JPEG", "CMYK"),
        encoded(PHOTOGRAPH, "PNG"),
        encoded(PHOTOGRAPH, "WEBP"),
    ],
    ids=["JPEG", "progressive JPEG", "grey JPEG", "CMYK JPEG", "PNG", "WebP"],
)
def test_truncated_images_are_refused(data, kept):
    with pytest.raises(images.DamagedImageError):
        images.decode(data[: int(len(data) * kept)])


def test_damaged_pixels_of_a_png_are_refused():
    data = bytearray(encoded(PHOTOGRAPH, "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(images.DamagedImageError):
        images.decode(bytes(data))


@pytest.mark.parametrize(
    "bomb",
    [
        jpeg_with_size(20_000, 20_000),
        jpeg_with_size(10_000, 8_000),
        png_header(20_000, 20_000),
        png_header(9_000, 9_000),
    ],
    ids=["JPEG", "JPEG just above", "PNG", "PNG just above"],
)
def test_a_decompression_bomb_is_refused_from_its_header(bomb, monkeypatch):
    def decoded(*_, **__):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr(Image.Image, "load", decoded)
    with pytest.raises(images.DamagedImageError, match=r"pixels|Bomb"):
        images.decode(bomb)


def test_central_view_is_a_central_crop_resized_with_half_pixel_centres():
    ramp = np.repeat(np.arange(0, 240, 3, dtype=np.uint8)[None, :, None], 80, 0).repeat(3, 2)  # value = 3 * column
    view = images.central_view(ramp, 10, 0.5)  # columns 20 to 59, by a factor of 4
    np.testing.assert_allclose(view[5, :, 0], 3 * (20 + 4 * (np.arange(10) + 0.5) - 0.5), atol=0.6)
    np.testing.assert_array_equal(images.central_view(ramp[:, :80], 80, 1.0), ramp)


def test_random_crops_have_the_area_and_the_aspect_that_were_asked_for():
    source = rng()
    boxes = np.array([images.random_crop_box(400, 400, (0.05, 1.0), source) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 400).all()
    area, aspect = height * width / 400**2, width / height
    assert area.min() < 0.06
    assert area.max() > 0.9
    assert 0.72 < aspect.min() < 0.78
    assert 1.30 < aspect.max() < 1.36
    assert abs(np.mean(np.log(aspect))) < 0.02
    assert top.std() > 20


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    assert images.random_crop_box(10, 1000, (0.9, 1.0), rng()) == (0, 493, 10, 13)
    assert images.random_crop_box(1000, 10, (0.9, 1.0), rng()) == (493, 0, 13, 10)


def test_inception_view_shows_the_box_and_flips_every_second_one():
    image = photograph(3)
    flips = 0
    for seed in range(200):
        top, left, height, width = images.random_crop_box(*image.shape[:2], (0.3, 1.0), rng(seed))
        straight = images.resize(image[top : top + height, left : left + width], 40)
        view = images.inception_view(image, 40, (0.3, 1.0), rng(seed))
        flipped = np.array_equal(view, straight[:, ::-1])
        assert flipped or np.array_equal(view, straight)
        flips += flipped
    assert 70 < flips < 130


def test_shifted_view_moves_by_up_to_its_pixels_and_brings_in_black():
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = 255
    places = {tuple(np.argwhere(images.shifted_view(image, 2, rng(seed))[..., 0])[0]) for seed in range(400)}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    white = np.full((8, 8, 3), 255, np.uint8)
    views = [images.shifted_view(white, 2, rng(seed)) for seed in range(20)]
    assert all(view.shape == white.shape for view in views)
    assert any((view == 0).any() for view in views)


def test_to_float_spans_minus_one_to_one():
    out = np.empty((1, 256, 3), np.float32)
    images.to_float(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2), out)
    np.testing.assert_allclose(out[0, :, 0], np.linspace(-1, 1, 256), atol=1e-6)


class Given:
    """Stands in for a Generator: gives what the test wants to be drawn."""

    def __init__(self, brightness: float, saturation: float, brightness_is_first: int):
        self._uniform, self._first = [brightness, saturation], brightness_is_first

    def uniform(self, low: float, high: float) -> float:
        return self._uniform.pop(0)

    def integers(self, high: int) -> int:
        return self._first


@pytest.mark.parametrize("brightness", [-32 / 255, 0.0, 32 / 255])
@pytest.mark.parametrize("saturation", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("brightness_is_first", [0, 1])
def test_color_is_distorted_as_in_hsv(brightness, saturation, brightness_is_first):
    noise = rng().integers(0, 256, (200, 200, 3), np.uint8)  # with the photograph more than is distorted at once
    image = np.concatenate([cv2.resize(photograph(2), (200, 200)), noise])[::2]
    out = np.full(image.shape, np.nan, np.float32)
    images.to_float_with_distorted_color(image[:, ::-1], out, Given(brightness, saturation, brightness_is_first))

    def scale_saturation(rgb):
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = np.minimum(hsv[..., 1] * saturation, 1)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    expected = image[:, ::-1] / np.float32(255)
    inside = np.ones(image.shape[:2], bool)  # where OpenCV's HSV is defined
    if brightness_is_first:
        inside = expected.min(-1) + brightness >= 0
        expected = scale_saturation(expected + np.float32(brightness))
    else:
        expected = scale_saturation(expected) + brightness
    np.testing.assert_allclose(out[inside], (np.clip(expected, 0, 1) * 2 - 1)[inside], atol=2e-3)
    assert out.min() >= -1
    assert out.max() <= 1


def test_the_same_rng_gives_the_same_view():
    image = photograph(5)

    def view(seed: int) -> np.ndarray:
        out = np.empty((32, 32, 3), np.float32)
        source = rng(seed)
        images.to_float_with_distorted_color(images.inception_view(image, 32, (0.05, 1.0), source), out, source)
        return out

    np.testing.assert_array_equal(view(1), view(1))
    assert not np.array_equal(view(1), view(2))
