"""Lists the public weights that have a name here, with the sums that their files must have.

Sums come from what the publishers say: `file_hash` in keras/src/applications gives the MD5 of Keras' files (Keras
publishes no SHA-256), and the Hugging Face Hub shows the SHA-256 of a file on its page. A file without a pinned sum is
checked against the sum that the hub states when it is first downloaded; its SHA-256 is then recorded in the cache.
"""

from __future__ import annotations

import dataclasses

# The names of timm's files in a repository on the hub.
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Release:
    """A published weight file.

    Attributes:
      network: `config.model.name` of its network.
      file: path of the file on Keras' server, or in the repository on the hub.
      size: size in bytes; for files on the hub rounded, as its pages show it.
      top1: published top-1 accuracy on ImageNet in percent, or None if there is no classifier.
      repository: OWNER/NAME on the hub, or None for Keras' server.
      revision: branch or commit of the repository.
      md5: published MD5, or None.
      sha256: published SHA-256, or None.
      checked: whether somebody has compared the sums with the downloaded file. Set it in the change that does.
    """

    network: str
    file: str
    size: int
    top1: float | None
    repository: str | None = None
    revision: str = "main"
    md5: str | None = None
    sha256: str | None = None
    checked: bool = False

    @property
    def pins(self) -> dict[str, str]:
        """The pinned sums by algorithm."""
        return {name: value for name in ("sha256", "md5") if (value := getattr(self, name))}


# Accuracies: https://keras.io/api/applications and results/results-imagenet.csv of timm (299 pixels).
RELEASES = {
    "keras/xception": Release(
        "xception",
        "xception/xception_weights_tf_dim_ordering_tf_kernels.h5",
        size=91_884_032,
        top1=79.0,
        md5="0a58e3b7378bc2990ea3b43d5981f1f6",
    ),
    "keras/xception_notop": Release(
        "xception",
        "xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        size=83_683_744,
        top1=None,
        md5="b0042744bf5b25fce3cb969f33bebb97",
    ),
    "keras/inception_v3": Release(
        "inception_v3",
        "inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels.h5",
        size=96_112_376,
        top1=77.9,
        md5="9a0d58056eeedaa3f26cb7ebd46da564",
    ),
    "keras/inception_v3_notop": Release(
        "inception_v3",
        "inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        size=87_910_968,
        top1=None,
        md5="bcbd6486424b2319ff4ef7d526e38f63",
    ),
    "timm/inception_v3.tv_in1k": Release(
        "inception_v3",
        "model.safetensors",
        size=95_500_000,
        top1=77.434,
        repository="timm/inception_v3.tv_in1k",
        sha256="9c452c63a67fd03a38a78c401ba12d4be0e926df63c93403de3a29f6df20fefb",
    ),
    "timm/inception_v3.tf_in1k": Release(
        "inception_v3",
        "model.safetensors",
        size=95_500_000,
        top1=77.862,
        repository="timm/inception_v3.tf_in1k",
    ),
    "timm/inception_v3.gluon_in1k": Release(
        "inception_v3",
        "model.safetensors",
        size=95_500_000,
        top1=78.806,
        repository="timm/inception_v3.gluon_in1k",
        revision="8e0669b67a46e31836862f7c11e6ffd35046c186",
    ),
}

# File names of Keras' releases by their MD5, to recognize files that were downloaded in another way.
KERAS_FILES = {
    release.md5: release.file.rpartition("/")[2] for release in RELEASES.values() if release.repository is None
}

# timm has these weights only as pickles, which are not read here.
PICKLES = ("timm/legacy_xception", "timm/legacy_xception.tf_in1k", "timm/xception")
