"""Tests that archives from strangers end with three lines, within the time and memory that their size explains."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import struct
import tarfile
import time
import tracemalloc

import pytest

from xception_jax.data.prepare import archives, fashion_mnist
from xception_jax.errors import BadDataError

JPEG = b"\xff\xd8\xff not decoded here"


def header(name: str, size: int | bytes, kind: bytes = b"0", link: str = "") -> bytes:
    """Returns the header of a member; a size in bytes is used as it is."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = size if isinstance(size, int) and size < 8 << 30 else 0
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    if isinstance(size, bytes):
        data[124:136] = size
    elif size >= 8 << 30:
        data[124:136] = b"\x80" + size.to_bytes(11)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def member(name: str, content: bytes = JPEG, kind: bytes = b"0") -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


@contextlib.contextmanager
def at_most(num_bytes: int):
    """Checks the peak of Python's memory in the block."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < num_bytes


END = bytes(1024)
GNU_SPARSE_1_0 = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n30 GNU.sparse.realsize=9999\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (header("a.JPEG", 1 << 62) + END, "more than the archive"),
        (header("._a", 1 << 62) + END, "more than the archive"),
        (header("a.JPEG", b"\xff" * 12) + END, "damaged|more than the archive"),
        (header("a.JPEG", b"77777777777\0") + JPEG, "more than the archive"),
        (member("a.JPEG", kind=b"S") + END, "damaged|neither links"),
        (member("x", GNU_SPARSE_1_0, b"x") + member("a.JPEG") + END, "damaged|neither links"),
        (header("x", 1 << 40, b"x") + END, "a header has 1,099,511,627,776 bytes"),
        (header("x", 1 << 40, b"g") + END, "a header has"),
        (header("x", 1 << 40, b"L") + END, "a header has"),
        (header("x", 1 << 40, b"K") + END, "a header has"),
        (member("x", b"0", b"L") * 3000 + END, "damaged"),
        (member("x", b"99 hdrcharset=\xff\n", b"x") + member("a.JPEG") + END, "damaged|printable"),
        (member("a\nb.JPEG") + END, "printable names"),
        (member("n/\x1b[31m.JPEG") + END, "printable names"),
        (member("x", b"\xffa.JPEG\0", b"L") + member("a") + END, "printable names"),
        (member("x", b"b" * 300 + b".JPEG\0", b"L") + member("a") + END, "at most 255"),
        (header("a.JPEG", 0, b"2", "/etc/passwd") + END, "neither links"),
        (header("a.JPEG", 0, b"1", "b.JPEG") + END, "neither links"),
        (member("a.txt") + END, "names that end in .JPEG"),
        (b"BZh9" + bytes(1000), "compressed by bzip2"),
        (lzma.compress(member("a.JPEG") + END), "compressed by xz"),
        (member("a.JPEG") + END + bytes(4096) + member("b.JPEG") + END, "data follow its end"),
        (gzip.compress(member("a.JPEG") + END + member("b.JPEG") + END, mtime=0), "data follow its end"),
        (b"\x1f\x8b" + bytes(100), "damaged"),
        (b"", "damaged at its beginning"),
        (gzip.compress(b"", mtime=0), "damaged at its beginning"),
        (gzip.compress(member("a.JPEG") + END, mtime=0) + b"garbage", "Not a gzipped file"),
        (gzip.compress(member("a.JPEG") + END, mtime=0)[:-8] + bytes(8), "CRC check failed"),
        (gzip.compress(member("a.JPEG") + END, mtime=0) * 2, "data follow its end"),
        (gzip.compress(member("a.JPEG") + END, mtime=0)[:-20], "damaged"),
    ],
    ids=lambda value: "archive" if isinstance(value, bytes) else None,
)
def test_a_hostile_archive_is_refused_at_once(tmp_path, content, what):
    (tmp_path / "a.tar").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(BadDataError, match=what) as raised:
        list(map(archives.Member.read, archives.members("a.tar", path=tmp_path / "a.tar")))
    assert time.perf_counter() - start < 10
    lines = str(raised.value).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 600 for line in lines)


def test_an_archive_in_several_gzip_members_with_a_volume_label_is_read(tmp_path):
    """As bgzip and GNU tar --label write them."""
    whole = header("label", 0, b"V") + member("a.JPEG") + member("b.JPEG") + END
    cut = len(whole) // 2
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole[:cut]) + gzip.compress(whole[cut:]))
    found = archives.members("a.tar.gz", path=tmp_path / "a.tar.gz")
    assert [(each.name, each.read()) for each in found] == [("a.JPEG", JPEG), ("b.JPEG", JPEG)]


def test_an_archive_that_expands_too_far_is_refused(tmp_path):
    bomb = gzip.compress(header("._skipped", 1 << 26) + bytes(1 << 26) + END, 1)
    (tmp_path / "a.tar.gz").write_bytes(bomb)
    with pytest.raises(BadDataError, match="more than the archive"), at_most(64 << 20):
        list(archives.members("a.tar.gz", path=tmp_path / "a.tar.gz"))


def test_an_image_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    (tmp_path / "a.tar").write_bytes(member("a.JPEG", bytes(1001)) + END)
    with pytest.raises(BadDataError, match="images of at most 1,000 bytes"):
        next(archives.members("a.tar", path=tmp_path / "a.tar")).read()


def test_an_archive_in_an_archive_is_bounded_by_its_own_size(tmp_path):
    inner = gzip.compress(member("a.JPEG") + header("._b", 1 << 24) + bytes(1 << 24) + END)
    (tmp_path / "a.tar").write_bytes(member("n01440764.tar", inner) + bytes(1 << 25) + END)
    found = archives.members("a.tar", path=tmp_path / "a.tar")
    outer = next(found)
    with pytest.raises(BadDataError, match="more than the archive"):
        list(archives.members("inner", stream=outer.file, size=outer.size))


def test_the_number_of_members_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    for count in (2, 4):
        (tmp_path / "a.tar").write_bytes(member("a.JPEG") * count + END)
        if count < 3:
            assert len(list(archives.members("a.tar", path=tmp_path / "a.tar"))) == count
        else:
            with pytest.raises(BadDataError, match="at most 3 files"):
                list(archives.members("a.tar", path=tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">HBB3I", 0, 8, 3, 1 << 31, 1 << 31, 4) + bytes(100),  # the product is 2**64
        struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28) + b"x",
        b"\0\0\x08\x03",
        b"",
    ],
    ids=("product", "length", "header", "empty"),
)
@pytest.mark.parametrize("compressed", [False, True])
def test_hostile_idx_files_are_refused(tmp_path, content, compressed):
    name = "train-images-idx3-ubyte"
    (tmp_path / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(BadDataError, match=r"idx|damaged"):
        fashion_mnist.read_split(tmp_path, "train")


def test_an_idx_file_that_expands_too_far_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_MAX_BYTES", 1 << 20)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 26), 1))
    with pytest.raises(BadDataError, match="not a complete idx file"), at_most(4 << 20):
        fashion_mnist.read_split(tmp_path, "train")
