"""Public weight files that are recognised by their content.

Keras publishes its files with an MD5 sum (`file_hash` in keras/src/applications). MD5 tells that a download is whole;
it does not protect from a file that was made to have the same sum. SHA-256 sums of these files are not published.
"""

from __future__ import annotations

KERAS_FILES = {
    "0a58e3b7378bc2990ea3b43d5981f1f6": "xception_weights_tf_dim_ordering_tf_kernels.h5",
    "b0042744bf5b25fce3cb969f33bebb97": "xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
    "9a0d58056eeedaa3f26cb7ebd46da564": "inception_v3_weights_tf_dim_ordering_tf_kernels.h5",
    "bcbd6486424b2319ff4ef7d526e38f63": "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
}


def doubt(file_name: str, md5: str) -> str | None:
    """Returns a warning if a file has the name of a public one and other content."""
    if file_name not in KERAS_FILES.values() or KERAS_FILES.get(md5) == file_name:
        return None
    return f"{file_name} is the name of a public file, but this is another one (MD5 {md5})"
