"""Connects as the environment says and prints what it found. Arguments: `tpu` as on a host with TPUs, `metadata`."""

import os
import sys

import jax
from jax._src.clusters import cloud_tpu_cluster

from xception_jax.config import DistributedConfig
from xception_jax.errors import UserError
from xception_jax.processes import check_processes, start_distributed

cloud_tpu_cluster.running_in_cloud_tpu_vm = "tpu" in sys.argv
if "metadata" in sys.argv:
    del os.environ["TPU_SKIP_MDS_QUERY"]  # JAX has set it, because this is no host with TPUs
try:
    start_distributed(DistributedConfig(timeout=30))
    check_processes()
except UserError as error:
    sys.exit(f"{error}\n{error.exit_code}")
print(f"process {jax.process_index()} of {jax.process_count()}")
