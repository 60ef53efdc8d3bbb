"""Signs the headers of Riegeli files, which ArrayRecord files are, so that mutations of them get past the checksums.

The checksum is HighwayHash-64 (Alakuijala, Cox and Wassenberg 2016, arXiv 1612.06257) with a fixed key. A block of
64 KiB begins with a header of 24 bytes, and a chunk with one of 40 bytes.
"""

from __future__ import annotations

import struct

BLOCK_HEADER, CHUNK_HEADER = 24, 40

_MASK = (1 << 64) - 1
_KEY = struct.unpack("<4Q", b"Riegeli/records\nRiegeli/records\n")
_INITIAL_0 = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_INITIAL_1 = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)
# For both lanes of a pair: which of the pair's 16 bytes are added to its bytes 0 to 7.
_ZIPPER = ((3, 12, 2, 5, 14, 1, 15, 0), (11, 4, 10, 13, 9, 6, 8, 7))


def signed(content: bytes, chunks: tuple[int, ...]) -> bytes:
    """Returns a file with correct checksums of the headers of its blocks, and of the chunks at some offsets."""
    data = bytearray(content)
    for start in range(0, len(data) - BLOCK_HEADER, 1 << 16):
        data[start : start + 8] = highway_hash(bytes(data[start + 8 : start + BLOCK_HEADER]))
    for start in chunks:
        header = bytes(data[start + 8 : start + CHUNK_HEADER])
        data[start : start + 8] = highway_hash(header)
    return bytes(data)


def highway_hash(data: bytes) -> bytes:
    """Returns the HighwayHash-64 of data with Riegeli's key. Its length must be a multiple of 4."""
    state = _State()
    whole = len(data) // 32 * 32
    for start in range(0, whole, 32):
        state.update(struct.unpack_from("<4Q", data, start))
    if rest := len(data) - whole:
        state.v0 = [(lane + (rest << 32) + rest) & _MASK for lane in state.v0]
        state.v1 = [_rotate(lane & 0xFFFFFFFF, rest) | _rotate(lane >> 32, rest) << 32 for lane in state.v1]
        packet = bytearray(data[whole:].ljust(32, b"\0"))
        if rest & 16:
            packet[28:32] = data[whole + rest - 4 : whole + rest]
        state.update(struct.unpack("<4Q", packet))
    for _ in range(4):
        state.update(tuple((lane >> 32 | lane << 32) & _MASK for lane in (*state.v0[2:], *state.v0[:2])))
    return struct.pack("<Q", (state.v0[0] + state.v1[0] + state.mul0[0] + state.mul1[0]) & _MASK)


def _rotate(half: int, count: int) -> int:
    return (half << count | half >> (32 - count)) & 0xFFFFFFFF


class _State:
    def __init__(self) -> None:
        self.mul0, self.mul1 = list(_INITIAL_0), list(_INITIAL_1)
        self.v0 = [lane ^ key for lane, key in zip(_INITIAL_0, _KEY, strict=True)]
        self.v1 = [lane ^ (key >> 32 | key << 32) & _MASK for lane, key in zip(_INITIAL_1, _KEY, strict=True)]

    def update(self, packet: tuple[int, ...]) -> None:
        for i in range(4):
            self.v1[i] = (self.v1[i] + self.mul0[i] + packet[i]) & _MASK
            self.mul0[i] ^= (self.v1[i] & 0xFFFFFFFF) * (self.v0[i] >> 32)
            self.v0[i] = (self.v0[i] + self.mul1[i]) & _MASK
            self.mul1[i] ^= (self.v0[i] & 0xFFFFFFFF) * (self.v1[i] >> 32)
        for source, target in ((self.v1, self.v0), (self.v0, self.v1)):
            for pair in (0, 2):
                lanes = struct.pack("<2Q", source[pair], source[pair + 1])
                for lane, order in enumerate(_ZIPPER):
                    added = int.from_bytes(bytes(lanes[at] for at in order), "little")
                    target[pair + lane] = (target[pair + lane] + added) & _MASK
