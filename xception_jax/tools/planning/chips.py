"""Data sheets of chips: memory, peak speed and links, with the public source of each figure."""

from __future__ import annotations

import dataclasses

_GB, _TERA = 10**9, 10**12
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one device in JAX. On TPU v4 and v5p it includes both cores.

    Attributes:
      name: product name.
      hbm_bytes: size of the memory.
      hbm_bandwidth: bytes per second to and from memory.
      peak_flops: dense floating-point operations per second in bfloat16.
      float32_share: share of `peak_flops` that float32 convolutions reach at JAX's default precision. A TPU multiplies
        them in bfloat16, a GPU in TensorFloat-32.
      link_bandwidth: bytes per second that one link sends in one direction.
      axes: number of axes of the torus (TPU); 0 if the chips of a node are connected by a switch (GPU).
      links: number of links of one chip.
      wrap: the ends of an axis are linked if its number of chips is a multiple of this, in three dimensions if that of
        every axis is (TPU).
      network_bandwidth: bytes per second that a chip sends to other nodes (GPU).
      source: where these figures come from.
    """

    name: str
    hbm_bytes: int
    hbm_bandwidth: float
    peak_flops: float
    link_bandwidth: float
    axes: int
    links: int
    wrap: int
    source: str
    float32_share: float = 1.0
    network_bandwidth: float = 0.0


NODE = 8  # GPUs in an HGX node

CHIPS = {
    "v4": Chip(
        name="TPU v4",
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1200 * _GB,
        peak_flops=275 * _TERA,
        link_bandwidth=50 * _GB,
        axes=3,
        links=6,
        wrap=4,
        source="https://docs.cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023, arXiv:2304.01433, table 4",
    ),
    "v5e": Chip(
        name="TPU v5e",
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=819 * _GB,
        peak_flops=197 * _TERA,
        link_bandwidth=50 * _GB,  # 400 GB/s per chip, both directions of four ports
        axes=2,
        links=4,
        wrap=16,
        source="https://docs.cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        name="TPU v5p",
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765 * _GB,
        peak_flops=459 * _TERA,
        link_bandwidth=100 * _GB,  # 1,200 GB/s per chip, both directions of six ports
        axes=3,
        links=6,
        wrap=4,
        source="https://docs.cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        name="TPU v6e",
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1638 * _GB,
        peak_flops=918 * _TERA,
        link_bandwidth=100 * _GB,  # 800 GB/s per chip, both directions of four ports
        axes=2,
        links=4,
        wrap=16,
        source="https://docs.cloud.google.com/tpu/docs/v6e",
    ),
    "a100": Chip(
        name="NVIDIA A100 80GB SXM",
        hbm_bytes=80 * _GB,
        hbm_bandwidth=2039 * _GB,
        peak_flops=312 * _TERA,
        float32_share=0.5,
        link_bandwidth=25 * _GB,  # NVLink 3: 600 GB/s per chip, both directions of twelve links
        axes=0,
        links=12,
        wrap=0,
        network_bandwidth=25 * _GB,  # DGX A100: one 200 Gb/s adapter per GPU
        source="NVIDIA A100 data sheet (2021); DGX A100 data sheet",
    ),
    "h100": Chip(
        name="NVIDIA H100 SXM",
        hbm_bytes=80 * _GB,
        hbm_bandwidth=3350 * _GB,
        peak_flops=989 * _TERA,
        float32_share=0.5,
        link_bandwidth=25 * _GB,  # NVLink 4: 900 GB/s per chip, both directions of eighteen links
        axes=0,
        links=18,
        wrap=0,
        network_bandwidth=50 * _GB,  # DGX H100: one 400 Gb/s adapter per GPU
        source="NVIDIA H100 data sheet (2023); DGX H100 data sheet",
    ),
}
