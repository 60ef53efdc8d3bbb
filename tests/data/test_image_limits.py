"""Tests the limits that are checked before an image is decoded, and the memory that decoding may use."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import write_images
from tests.data.small_imagenet import encoded, jpeg, photograph
from xception_jax.data import images
from xception_jax.data.datasets import open_dataset
from xception_jax.data.decoding_memory import SMALL, DecodingMemory
from xception_jax.data.image_headers import orientation, read_header
from xception_jax.data.pipeline import EvaluationBatches

PHOTOGRAPH = photograph(0)
PROGRESSIVE = encoded(PHOTOGRAPH, "JPEG", progressive=True)
BOMB = zlib.compress(bytes(1 << 26), 9)


def with_scans(data: bytes, count: int) -> bytes:
    """Repeats the last scan of a progressive JPEG."""
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, extra: bytes = b"", depth: int = 8, interlaced: int = 0) -> bytes:
    """Encodes a black grey image, with other chunks before its pixels."""
    pixels = zlib.compress(bytes((1 + width * depth // 8) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def exif(value: int, entries: int = 1) -> bytes:
    """Encodes Exif data in which each entry but the orientation refers to all bytes."""
    size = 14 + 12 * entries
    others = b"".join(struct.pack("<HHII", 0x8000 + n % 0x7000, 7, size - 8, 8) for n in range(entries - 1))
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + others + struct.pack("<HHII", 0x112, 3, 1, value) + bytes(4)
    )


def peak_of(data: bytes) -> int:
    """Returns the most bytes that Python's allocator has for decoding an image."""
    import tracemalloc

    tracemalloc.start()
    try:
        images.decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (with_scans(PROGRESSIVE, 3000), "3,010 scans, above max_scans=100"),
        (with_scans(encoded(PHOTOGRAPH, "JPEG", progressive=True, exif=Image.Exif()), 91), "101 scans"),
        (png(1, 70_000), "1 x 70000 pixels; the limit for each side is 65,535"),
        (png(70_000, 1), "70000 x 1 pixels"),
        (jpeg(PHOTOGRAPH)[:2] + b"\xff\xec\0\2" * 70_000 + jpeg(PHOTOGRAPH)[2:], "more than 65,536 segments"),
        (jpeg(PHOTOGRAPH)[:2] + b"\xff" * 70_000 + jpeg(PHOTOGRAPH)[2:], "more than 65,536 segments"),
        (png(8, 8, chunk(b"abCd", b"") * 70_000), "more than 65,536 chunks"),
        (png(8, 8, chunk(b"IDAT", b"") * 70_000), "more than 65,536 chunks"),
        (png(8, 8)[:-26], "runcated|broken|not enough"),
        (png(8, 8, struct.pack(">I", 1 << 31) + b"tEXtabcd"), "ends after the file"),
        (png(8, 8, chunk(b"tEXt", b"a\0b")[:-1] + b"x"), "checksum of the chunk"),
    ],
    ids=lambda value: "image" if isinstance(value, bytes) else None,
)
def test_a_limit_is_found_in_the_header_and_named(data, what):
    start = time.perf_counter()
    with pytest.raises(images.DamagedImageError, match=what):
        images.decode(data)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("marker", [0x01, 0xD0, 0xD7, 0x00, 0xC8, 0xF0])
def test_no_marker_hides_scans_from_the_count(marker):
    scans = with_scans(PROGRESSIVE, 200)
    for before in (bytes((0xFF, marker)), bytes((0xFF, marker, 0xFF, 0xFF)), b"\xff\xfe\0\1", b"x"):
        with pytest.raises(images.DamagedImageError):
            images.decode(scans[:2] + before + scans[2:])


def test_bytes_after_the_image_are_no_scans():
    data = PROGRESSIVE + b"\xff\xda" * 5000
    assert read_header(data).scans == read_header(PROGRESSIVE).scans
    assert read_header(data + PROGRESSIVE * 50).scans == read_header(PROGRESSIVE).scans
    np.testing.assert_array_equal(images.decode(data), images.decode(PROGRESSIVE))


@pytest.mark.parametrize(
    "part", [b"\xff\xfe\0\4\xff\xd9", b"\xff\xe1\0\6\xff\xd9\xff\xd9", b"\xff\xd0" * 9, b"\xff\1" * 70_000]
)
def test_nothing_between_scans_hides_those_that_follow(part):
    data = with_scans(PROGRESSIVE[:-2] + part + PROGRESSIVE[-2:], 1)
    last = data.rindex(b"\xff\xda")
    hidden = data[:last] + part + data[last:-2] * 200 + data[-2:]
    assert read_header(hidden).scans > 200
    with pytest.raises(images.DamagedImageError, match="above max_scans=100"):
        images.decode(hidden)


def test_limits_can_be_raised():
    with pytest.raises(images.DamagedImageError, match="above max_pixels=100"):
        images.decode(jpeg(PHOTOGRAPH), images.Limits(max_pixels=100))
    data = with_scans(encoded(np.zeros((16, 16, 3), np.uint8), "JPEG", progressive=True), 0)
    with pytest.raises(images.DamagedImageError, match="max_scans=3"):
        images.decode(data, images.Limits(max_scans=3))
    assert images.decode(data).shape == (16, 16, 3)


def test_a_png_without_its_last_bytes_is_whole():
    for missing in (1, 4, 8, 12):
        assert images.decode(png(8, 8)[:-missing]).shape == (8, 8, 3)


def test_ordinary_files_are_far_below_the_limits():
    assert read_header(jpeg(PHOTOGRAPH)).scans == 1
    assert 5 < read_header(PROGRESSIVE).scans < 20
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(PROGRESSIVE)) + PROGRESSIVE  # scans in metadata do not count
    assert read_header(PROGRESSIVE[:2] + thumbnail * 20 + PROGRESSIVE[2:]).scans == read_header(PROGRESSIVE).scans


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"name\0\0" + BOMB) * 40,
        chunk(b"iCCP", b"name\0\0" + BOMB),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
        chunk(b"eXIf", exif(1, entries=50_000)),
        chunk(b"acTL", struct.pack(">II", 1 << 30, 0)) + chunk(b"fcTL", bytes(26)),
    ],
    ids=["zTXt", "iCCP", "iTXt", "eXIf", "acTL"],
)
def test_metadata_of_a_png_is_not_expanded(extra):
    data = png(8, 8, extra)
    np.testing.assert_array_equal(images.decode(data), np.zeros((8, 8, 3)))
    assert peak_of(data) < len(data) + (1 << 20)


def test_metadata_of_a_jpeg_is_not_expanded():
    part = exif(6, entries=5_000)
    data = encoded(PHOTOGRAPH, "JPEG", exif=exif(6))
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\0\0" + part
    assert images.decode(data[:2] + segment * 20 + data[2:]).shape == PHOTOGRAPH.swapaxes(0, 1).shape
    assert peak_of(data[:2] + segment * 20 + data[2:]) < 20 * len(part) * 2 + (1 << 20)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_the_orientation_is_read_in_every_format(image_format):
    buffer = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).save(buffer, image_format, lossless=True, exif=exif(6))
    np.testing.assert_array_equal(images.decode(buffer.getvalue()), np.rot90(PHOTOGRAPH, -1))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (exif(8), 8),
        (exif(9), 1),
        (exif(3)[:-9], 1),
        (b"", 1),
        (b"II*\0", 1),
        (b"II*\0\xff\xff\xff\xff", 1),
        (b"Exif\0\0" + exif(5), 5),
        (b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0", 6),
    ],
)
def test_exif_data_of_all_kinds(data, expected):
    assert orientation(data) == expected


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    (tmp_path / "large").write_bytes(bytes(1001))
    with pytest.raises(images.DamagedImageError, match="more than 1,000 bytes"):
        images.read(tmp_path / "large")


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            images.read(path)


def test_decoding_waits_for_memory_in_the_order_of_arrival():
    memory, order, release = DecodingMemory(), [], threading.Event()

    def work(number: int, amount: int) -> None:
        with memory.reserve(amount * SMALL * 2, limit=20 * SMALL):
            order.append(number)
            assert memory.used <= 20 * SMALL or amount > 10
            release.wait(60)

    threads, deadline = [], time.monotonic() + 60
    for number, amount in enumerate((6, 30, 1, 5)):  # the second is above the limit and waits until it is alone
        threads.append(threading.Thread(target=work, args=(number, amount), daemon=True))
        threads[-1].start()
        while order != [0] or len(memory._queue) != number:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    release.set()
    for thread in threads:
        thread.join(60)
    assert order[:2] == [0, 1]
    assert sorted(order) == [0, 1, 2, 3]
    assert memory.used == 0
    with memory.reserve(SMALL, limit=1):  # small amounts never wait
        assert memory.used == 0


def test_an_interrupted_wait_leaves_the_queue():
    memory = DecodingMemory()
    with memory.reserve(2 * SMALL, 1):
        waiting = memory.reserve(2 * SMALL, 1)
        memory._fits = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            waiting.__enter__()
        del memory._fits
    with memory.reserve(2 * SMALL, 1):
        assert memory.used == 2 * SMALL


def test_many_large_images_in_many_threads_stay_within_the_memory(data, tmp_path, monkeypatch):
    """Every image needs more than the limit: all are decoded, one after the other."""
    write_images(tmp_path, "large", [encoded(photograph(n).repeat(4, 0).repeat(4, 1), "PNG") for n in range(12)])
    from xception_jax.data import decoding_memory

    most = []
    fits = DecodingMemory._fits
    monkeypatch.setattr(DecodingMemory, "_fits", lambda self, *a: most.append(self.used) or fits(self, *a))
    config = data.replace(name="large", data_dir=str(tmp_path), threads=8, decoding_memory=1)
    batches = EvaluationBatches(config, open_dataset(config, "train"), batch_size=12)
    (batch,) = list(batches)
    assert not batch["damaged"].any()
    assert max(most) == 480 * 360 * 16  # never two
    assert decoding_memory.DECODING.used == 0


def test_images_above_a_limit_count_as_damaged(data, tmp_path):
    write_images(tmp_path, "scans", [PROGRESSIVE, jpeg(PHOTOGRAPH)])
    config = data.replace(name="scans", data_dir=str(tmp_path), max_scans=2)
    (batch,) = list(EvaluationBatches(config, open_dataset(config, "train"), batch_size=2))
    assert batch["damaged"].tolist() == [True, False]


def grey_jpeg(side: int, factors: list[tuple[int, int]]) -> bytes:
    """Returns a grey JPEG whose components have these horizontal and vertical sampling factors.

    Each block is the code of no difference and the end of the block in the tables that Pillow writes.
    """
    source = encoded(np.zeros((8, 8, 3), np.uint8), "JPEG", subsampling=0)
    tables, at = b"", 2
    while source[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(source[at + 2 : at + 4])
        tables += source[at:end] if source[at + 1] in (0xDB, 0xC4) else b""
        at = end
    widest, highest = (max(factor[axis] for factor in factors) for axis in (0, 1))
    blocks = sum(h * v for h, v in factors) * -(-side // (8 * widest)) * -(-side // (8 * highest))
    bits = "001010" * blocks
    pixels = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8))
    count = len(factors)
    frame = struct.pack(">HBHHB", 8 + 3 * count, 8, side, side, count)
    frame += b"".join(bytes([number, h << 4 | v, 0]) for number, (h, v) in enumerate(factors, 1))
    scan = struct.pack(">HB", 6 + 2 * count, count) + b"".join(bytes([number + 1, 0]) for number in range(count))
    return b"\xff\xd8" + tables + b"\xff\xc0" + frame + b"\xff\xda" + scan + b"\0\x3f\0" + pixels + b"\xff\xd9"


@pytest.mark.parametrize("luma", [(4, 2), (1, 4), (2, 2)])
def test_rare_chroma_samplings_are_decoded(luma):
    """simplejpeg knows few of them, and takes others for damage."""
    image = images.decode(grey_jpeg(64, [luma, (1, 1), (1, 1)]))
    np.testing.assert_array_equal(image, np.full((64, 64, 3), 128, np.uint8))


def test_a_rare_sampling_is_counted_as_any_other():
    data = grey_jpeg(64, [(4, 2), (1, 1), (1, 1)])
    with pytest.raises(images.DamagedImageError, match="64 x 64 pixels, above max_pixels"):
        images.decode(data, images.Limits(max_pixels=100))
    with pytest.raises(images.DamagedImageError):
        images.decode(data[: data.index(b"\xff\xda")])
