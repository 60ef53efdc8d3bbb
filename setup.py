"""Lists the packages: `configs/` stays beside the package in the repository and is installed inside of it."""

from setuptools import find_packages, setup

CONFIGS = {"xception_jax.configs": "configs", "xception_jax.configs.studies": "configs/studies"}

setup(packages=[*find_packages(include=["xception_jax*"]), *CONFIGS], package_dir=CONFIGS)
