"""Processes find each other in each environment that launchers make, and refuse to train alone in one of them."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading

import jax
import pytest

from tests.conftest import ROOT, free_port
from xception_jax.config import DistributedConfig
from xception_jax.errors import ConfigError
from xception_jax.launchers import SKYPILOT_PORT, from_environment, gpus_of_task, may_have_peers, several_processes
from xception_jax.processes import check_processes, start_distributed


@pytest.mark.parametrize("value", ["host0", "host0:port", "host0:0", "host0:65536", "http://host0:1234", "host0:1234 "])
def test_an_address_that_no_process_could_connect_to_is_refused(monkeypatch, value):
    """Each process would wait for the others, and end with a code that launchers take for a preemption."""
    with pytest.raises(ConfigError, match=r"config\.distributed\.coordinator"):
        DistributedConfig(coordinator=value, num_processes=2)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", value)
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS"):
        start_distributed(DistributedConfig())


@pytest.mark.parametrize("value", ["host0:1234", "10.0.0.1:1", "host-0.svc_1.local:65535", "[fe80::1]:1234"])
def test_addresses(value):
    assert DistributedConfig(coordinator=value).coordinator == value


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    """As on the hosts of a TPU slice, where JAX counts all of them although nothing has connected them."""
    check_processes()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError) as error:
        check_processes()
    assert "0 of 4" in error.value.what
    assert "coordinator" in error.value.fix
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    check_processes()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, True),
        ({"SLURM_NTASKS": "many"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # also of a notebook in a cluster
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"SKYPILOT_NUM_NODES": "2"}, True),
    ],
)
def test_what_says_that_there_are_several(environment, several):
    assert bool(several_processes(environment)) == several


@pytest.mark.parametrize(
    ("fields", "environment", "on_tpu", "expected"),
    [
        ({}, {}, False, False),
        ({}, {}, True, True),
        ({"coordinator": "a:1"}, {}, False, True),
        ({}, {"SLURM_NTASKS": "2"}, False, True),
        ({}, {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, False, False),
        ({"start": "off", "coordinator": "a:1"}, {"SLURM_NTASKS": "2"}, True, False),
    ],
)
def test_who_may_have_peers(fields, environment, on_tpu, expected):
    assert may_have_peers(DistributedConfig(**fields), environment, on_tpu=on_tpu) == expected


def test_what_jax_does_not_read():
    assert from_environment({}) == {}
    jax_own = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
    assert from_environment(jax_own) == {"num_processes": 3, "process_id": 0}  # JAX reads the address
    job = {"JAX_COORDINATOR_ADDRESS": "a:1", "JOB_COMPLETION_INDEX": "2"}
    assert from_environment(job) == {"process_id": 2}
    mpi = {"JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    assert from_environment(mpi) == {"num_processes": 4, "process_id": 3}
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    expected = {"coordinator_address": f"10.0.0.1:{SKYPILOT_PORT}", "num_processes": 2, "process_id": 1}
    assert from_environment(sky) == expected


@pytest.mark.parametrize(
    ("tasks", "others", "expected"),
    [
        (2, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, [0, 1, 2]),
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "SLURM_GPUS_ON_NODE": "8"}, [0, 1]),
        (2, {"SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        (2, {"SLURM_GPUS_ON_NODE": "1"}, None),
        (2, {}, None),
        (16, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),  # a task for each GPU
        (2, {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, None),  # JAX reads it
    ],
)
def test_a_task_with_a_node_to_itself_has_all_gpus(tasks, others, expected):
    assert gpus_of_task({"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": str(tasks), **others}) == expected
    assert gpus_of_task(others) is None  # not started by srun


def test_a_process_of_mpi_with_a_node_to_itself_has_all_gpus(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    devices = f"{tmp_path}/nvidia[0-9]*"
    assert gpus_of_task({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, devices) == [0, 1]
    assert gpus_of_task({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "1,2,3"}, devices) == [0, 1, 2]
    assert gpus_of_task({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, devices) is None


def start(shared_environment, *environments, arguments=()):
    """Starts one process in each environment and returns their outputs, or errors, once they have ended."""
    command = [sys.executable, "tests/processes/start_program.py", *arguments]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=shared_environment | e, **options) for e in environments]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [out.splitlines()[-1] if out else errors for out, errors in outputs]


def test_tasks_of_a_job_that_was_not_started_by_srun_are_refused(shared_environment):
    """JAX cannot connect them, and each would train the whole network by itself."""
    (errors,) = start(shared_environment, {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"})
    assert errors.startswith("error: SLURM_NTASKS=2 says that there may be several processes")
    assert "srun" in errors
    assert errors.endswith("78\n")


@pytest.mark.faults
def test_the_variables_of_jax_connect_two_processes(shared_environment):
    common = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    found = start(shared_environment, *(common | {"JAX_PROCESS_ID": str(i)} for i in (0, 1)))
    assert found == ["process 0 of 2", "process 1 of 2"]


@pytest.mark.faults
def test_slurm_connects_two_processes(shared_environment):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = ({"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} for i in (0, 1))
    assert start(shared_environment, *(step | task for task in tasks)) == ["process 0 of 2", "process 1 of 2"]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"])
def test_gke_connects_two_hosts(shared_environment, name):
    common = {name: "localhost,localhost", "JAX_COORDINATOR_PORT": str(free_port()), "TPU_SKIP_MDS_QUERY": "1"}
    common |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    hosts = (common | {"TPU_WORKER_ID": str(i)} for i in (0, 1))
    assert start(shared_environment, *hosts, arguments=["tpu"]) == ["process 0 of 2", "process 1 of 2"]


@pytest.mark.faults
def test_the_metadata_server_connects_the_hosts_of_a_tpu_slice(shared_environment):
    """Without any variable: each host asks its own metadata server, here one on loopback for each."""

    def metadata_server(number):
        answers = {"agent-worker-number": str(number), "worker-network-endpoints": "localhost,localhost", "tpu-env": ""}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer = answers.get(self.path.rsplit("/", 1)[1])
                self.send_response(404 if answer is None else 200)
                self.end_headers()
                self.wfile.write((answer or "").encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever).start()
        return server

    servers = [metadata_server(i) for i in (0, 1)]
    try:
        common = {"JAX_COORDINATOR_PORT": str(free_port())}
        addresses = ("{}:{}".format(*server.server_address) for server in servers)
        hosts = (common | {"GCE_METADATA_IP": address} for address in addresses)
        found = start(shared_environment, *hosts, arguments=["tpu", "metadata"])
        assert found == ["process 0 of 2", "process 1 of 2"]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
