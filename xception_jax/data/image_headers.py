"""Reads the headers of JPEG, PNG and WebP files, before anything is decoded.

A small file can ask a decoder for hours or for gigabytes: with thousands of scans, with one row of 67 million pixels,
with compressed metadata, or with an Exif directory whose entries all refer to the same bytes. The headers tell the
cost, and `Header.content` leaves out metadata, so that no library expands it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg

MAX_PARTS = 1 << 16
"""Limit for segments before the pixels of a JPEG, and for chunks of a PNG or WebP image."""

_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_ORIENTATION_TAG = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # formats of the types BYTE, SHORT and LONG in Exif data

_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # of a segment or of the end; pixels have none
_FIRST_SEGMENT, _END_OF_IMAGE, _SCAN = b"\xc0", b"\xd9", b"\xda"
_ORDINARY_SCANS = 20  # encoders write no more

_START_OF_SCAN = 0xDA
_APP0, _APP1, _APP14, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, the rest of the range has other meanings
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDD))  # DHT, DAC, DQT, DRI
_METADATA = frozenset(range(_APP1, 0xF0)) - {_APP14} | {_COMMENT}  # APP0 and APP14 tell how colours are stored

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


class HeaderError(ValueError):
    """The header is damaged or of another format."""


class Header(NamedTuple):
    """Describes an image by its headers.

    Attributes:
      format: 'JPEG', 'PNG' or 'WEBP'.
      width: width in pixels, before the orientation is applied.
      height: height in pixels.
      content: the file, without metadata if a decoder would read it.
      scans: number of passes over the pixels; 1 if there is nothing to count.
      by_pillow: whether a JPEG has a chroma sampling that simplejpeg does not know.
      orientation: 1 to 8, as in Exif.
    """

    format: str
    width: int
    height: int
    content: bytes
    scans: int = 1
    by_pillow: bool = False
    orientation: int = 1


def read_header(data: bytes) -> Header:
    """Reads the header of an image.

    Raises:
      HeaderError: the header is damaged or of another format.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(_PNG_SIGNATURE):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except (IndexError, struct.error):
        raise HeaderError("the file ends within its header") from None
    raise HeaderError("not a JPEG, PNG or WebP image, or damaged at the start")


def _jpeg(data: bytes) -> Header:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        known = True
    except (ValueError, KeyError):  # a rare chroma sampling, or damage
        height = width = 0
        known = False
    exif, components, progressive = None, 0, False
    metadata = list[tuple[int, int]]()
    offset = 2
    for _ in range(MAX_PARTS):
        if data[offset + 1] == 0xFF:  # fill bytes may precede a marker
            offset += 1
            continue
        marker, end = data[offset + 1], offset + 2 + int.from_bytes(data[offset + 2 : offset + 4])
        if data[offset] != 0xFF or end < offset + 4:
            break
        if marker == _START_OF_SCAN:
            # Decoders go through the file only once if the first scan has all components.
            several = progressive or data[offset + 4] < components
            scans = _count_scans(data, offset) if several else 1
            if exif is None and known:
                return Header("JPEG", width, height, data, scans)
            if not height or not width:
                raise HeaderError("its size is not stated before its pixels")
            turn = 1 if exif is None else orientation(exif)
            return Header("JPEG", width, height, _without(data, metadata), scans, not known, turn)
        if marker in _FRAMES:
            if not known:
                height, width = struct.unpack_from(">HH", data, offset + 5)
            components, progressive = data[offset + 9], marker in _PROGRESSIVE
        elif marker in _METADATA:
            metadata.append((offset, end))
            if exif is None and marker == _APP1 and data.startswith(b"Exif\0\0", offset + 4):
                exif = data[offset + 10 : end]
        elif marker not in _TABLES and marker != _APP0 and marker != _APP14:
            break
        offset = end
    else:
        raise HeaderError(f"more than {MAX_PARTS:,} segments before its pixels")
    raise HeaderError(f"no JPEG marker at byte {offset:,}")


def _count_scans(data: bytes, start: int) -> int:
    """Counts the scans from the first one at `start` to the end of the image. Other bytes may follow it."""
    if (most := _count_starts(data, start)) <= _ORDINARY_SCANS:
        return most
    count, offset = 0, start
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, offset)
        if found is None or found[1] == _END_OF_IMAGE:
            return count
        count += found[1] == _SCAN
        offset = found.end()
        if found[1] >= _FIRST_SEGMENT:  # it is skipped by its length, as in decoders: no byte in it ends the image
            offset += int.from_bytes(data[offset : offset + 2])
    return most


def _count_starts(data: bytes, start: int) -> int:
    """Counts the bytes FF DA, which pixels do not contain. (This takes a tenth of the time of `bytes.count`.)"""
    marker = np.frombuffer(b"\xff\xda", np.uint16)
    lengths = ((len(data) - start) // 2, (len(data) - start - 1) // 2)
    pairs = (np.frombuffer(data, np.uint16, length, start + odd) for odd, length in enumerate(lengths))
    return sum(int(np.count_nonzero(of_parity == marker)) for of_parity in pairs)


def _without(data: bytes, parts: list[tuple[int, int]]) -> bytes:
    """Returns data without some parts."""
    starts, ends = [0, *(end for _, end in parts)], [*(start for start, _ in parts), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise HeaderError("the file does not begin with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    turned, others = 1, []
    for name, start, end in _chunks(data, len(_PNG_SIGNATURE), ">I4s", checksum=4):
        body = memoryview(data)[start + 4 : end - 4]
        if zlib.crc32(body) != int.from_bytes(data[end - 4 : end]):  # decoders do not read all checksums of pixels
            raise HeaderError(f"the checksum of the chunk at byte {start:,} is wrong")
        if name not in _PNG_PIXELS:
            others.append((start, end))
            if name == b"eXIf" and turned == 1:
                turned = orientation(bytes(body[4:]))
        elif name == b"IEND":
            break
    return Header("PNG", width, height, _without(data, others) if others else data, orientation=turned)


def _webp(data: bytes) -> Header:
    first = data[12:16]
    if first == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif first == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    elif first == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        raise HeaderError("not a JPEG, PNG or WebP image, or damaged at the start")
    turned = 1
    if first == b"VP8X":
        for name, start, end in _chunks(data, 12, "<4sI"):
            if name == b"EXIF":
                turned = orientation(data[start + 8 : end])
                break
    return Header("WEBP", width, height, data, orientation=turned)


def _chunks(data: bytes, offset: int, layout: str, checksum: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, end) of each chunk of a PNG or WebP file."""
    header = struct.Struct(layout)
    for _ in range(MAX_PARTS):
        if offset + header.size > len(data):
            return
        first, second = header.unpack_from(data, offset)
        name, length = (first, second) if isinstance(first, bytes) else (second, first)
        end = offset + header.size + length + checksum
        if end > len(data):
            if name in _PNG_PIXELS:  # the decoder knows whether it needs what is missing
                return
            raise HeaderError(f"the chunk at byte {offset:,} ends after the file")
        yield name, offset, end
        offset = end if checksum else end + length % 2  # WebP pads to an even length
    raise HeaderError(f"more than {MAX_PARTS:,} chunks")


def orientation(exif: bytes) -> int:
    """Returns the orientation, 1 to 8, in the first directory of Exif data, and 1 if there is none.

    Only this entry is read. Readers of all entries can need gigabytes, because entries may share their bytes.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return 1
    entry = struct.Struct(f"{order}HHI")
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = entry.unpack_from(exif, at)
            if tag == _ORIENTATION_TAG and number == 1 and kind in _INTEGERS:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], exif, at + entry.size)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the directory ends after the data
        pass
    return 1
