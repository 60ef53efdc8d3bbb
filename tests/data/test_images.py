from __future__ import annotations

import io
import struct
import zlib

import cv2
import jax
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
    deep = PHOTOGRAPH[..., 0].astype(np.uint16) * 256 + 55  # 16-bit images are decoded separately
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(images.decode(buffer.getvalue())[..., 0], transform(PHOTOGRAPH[..., 0]))


@pytest.mark.parametrize("exif", [None, 1, 6])
def test_a_jpeg_with_exif_is_as_damaged_as_one_without(exif):
    """Decoders differ in the warnings that they ignore; half of the pixels were wrong where Pillow decoded."""
    tags = Image.Exif()
    if exif is not None:
        tags[0x0112] = exif
    whole = encoded(PHOTOGRAPH, "JPEG", quality=95, **({} if exif is None else {"exif": tags}))
    assert sorted(images.decode(whole + bytes(100)).shape) == sorted(PHOTOGRAPH.shape)
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + bytes(300) + whole[middle + 300 :],
        whole[:middle],
        whole[:-2] + bytes(98) + b"1" + whole[-2:],
        whole[:-200] + bytes(198) + whole[-2:],
    ):
        with pytest.raises(images.DamagedImageError, match="JPEG"):
            images.decode(damaged)


@pytest.mark.parametrize("zero", [False, True], ids=["pixels end otherwise", "pixels end with FF 00"])
def test_zeros_before_the_end_of_a_jpeg_are_ignored(zero):
    rng = np.random.default_rng(0)
    files = (encoded(rng.integers(0, 256, (16, 16, 3), np.uint8), "JPEG") for _ in range(5_000))
    whole = next(data for data in files if (data[-4:-2] == b"\xff\x00") == zero)
    np.testing.assert_array_equal(images.decode(whole[:-2] + bytes(500) + whole[-2:]), images.decode(whole))


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


@pytest.mark.parametrize("image", [PHOTOGRAPH, np.full((48, 64, 3), 100, np.uint8)], ids=["photograph", "constant"])
def test_damaged_pixels_of_a_png_are_refused(image):
    data = encoded(image, "PNG")
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for at in range(start, end, max(1, (end - start) // 500)):
        damaged = bytearray(data)
        damaged[at] ^= 0x80
        with pytest.raises(images.DamagedImageError):
            images.decode(bytes(damaged))


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


@pytest.mark.parametrize("size", [40, 71, 200])
def test_the_default_resizes_as_jax_does_without_antialiasing(size):
    """Averages over areas, or the nearest pixels, differ by 40 levels and more."""
    image = photograph(3)
    expected = jax.image.resize(image.astype(np.float32), (size, size, 3), "linear", antialias=False)
    np.testing.assert_allclose(images.resize(image, size), expected, atol=1)
    np.testing.assert_allclose(images.central_view(image, size, 1.0), expected, atol=1)


def test_to_float_spans_minus_one_to_one():
    out = np.empty((1, 256, 3), np.float32)
    images.to_float(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2), out)
    np.testing.assert_allclose(out[0, :, 0], np.linspace(-1, 1, 256), atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "antialiased_bilinear", "antialiased_bicubic"])
@pytest.mark.parametrize("shape", [(400, 240), (240, 400), (240, 240), (40, 1000)])
def test_the_visible_part_of_an_image_is_where_its_pixels_come_from(interpolation, shape):
    view = images.Preprocessing(64, 0.8, interpolation)
    top, left, height, width = view.visible_box(*shape)
    for axis, (start, length) in enumerate(((top, height), (left, width))):
        ramp = np.linspace(0, 255, shape[axis]).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        seen = view.pixels(np.broadcast_to(ramp, (*shape, 3)).round().astype(np.uint8))[..., 0]
        values = seen.mean(axis=1 - axis) * (shape[axis] - 1) / 255
        centres = start + (np.arange(64) + 0.5) * length / 64 - 0.5
        np.testing.assert_allclose(values, centres, atol=0.012 * shape[axis])
