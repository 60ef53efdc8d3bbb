"""Trains a network: the same as `xception-jax train`, for a checkout that is not installed."""

import sys

from xception_jax.__main__ import start

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    start()
