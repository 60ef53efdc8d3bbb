"""Runs a real Slurm with two nodes on this machine, from Debian's packages, without installing anything.

The packages are downloaded with `apt-get download` and unpacked into a cache folder. The daemons run as the current
user, in a folder of their own and with a configuration of their own, and end with the context.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = (
    *("slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins"),
    *("munge", "libmunge2", "libhwloc15", "liblua5.1-0"),
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xception_jax" / "slurm_for_tests"
SECONDS_TO_START = 60


def unpack_packages() -> Path:
    """Returns the folder with the unpacked packages, downloading them if they are not there.

    Raises:
      OSError, subprocess.SubprocessError: apt is not installed, or no Debian mirror can be reached.
    """
    if not (CACHE / "usr").exists():
        downloaded = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
        downloaded.mkdir(parents=True)
        try:
            command = ["apt-get", "download", *PACKAGES]
            subprocess.run(command, cwd=downloaded, check=True, capture_output=True, timeout=120)
            for package in downloaded.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, downloaded], check=True, capture_output=True)
                package.unlink()
            with contextlib.suppress(FileExistsError):
                downloaded.rename(CACHE)
        finally:
            shutil.rmtree(downloaded, ignore_errors=True)
    return CACHE


class SlurmCluster:
    """Two nodes. Use `running` to make one."""

    def __init__(self, packages: Path, folder: Path):
        self._packages, self._folder = packages, folder
        (libraries,) = (packages / "usr" / "lib").glob("*-linux-gnu")
        plugins = libraries / "slurm-wlm"
        self._plugins = plugins
        # JAX connects to the first node by its name, so that is the name of this machine.
        self._nodes = (socket.gethostname(), f"{socket.gethostname()}x")
        self.environment = os.environ | {
            "PATH": f"{packages}/usr/bin:{packages}/usr/sbin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}:{plugins}",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self, stack: contextlib.ExitStack) -> None:
        """Starts the daemons, and waits until both nodes are idle."""
        self._write_configuration()
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._folder.chmod(0o755)
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        paths = (key, *(self._folder / name for name in ("munge.socket", "munge.pid", "munge.log", "munge.seed")))
        flags = [f"--{name}={path}" for name, path in zip(names, paths, strict=True)]
        self._daemon(stack, "munged", "--foreground", "--force", *flags)
        self._wait("munge", lambda: (self._folder / "munge.socket").exists())
        self._daemon(stack, "slurmctld-wlm", "-D", "-c")
        for node in self._nodes:
            self._daemon(stack, "slurmd-wlm", "-D", "-N", node, "-d", f"{self._packages}/usr/sbin/slurmstepd-wlm")
        self._wait("both nodes", lambda: self.run("sinfo", "--noheader", "--format=%T %D") == "idle 2")

    def run(self, *command: str, **options: Any) -> str:
        """Returns the output of a command of Slurm, or its error after the word 'error'."""
        defaults = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60}
        process = subprocess.run(command, **(defaults | options))
        return process.stdout.strip() if process.returncode == 0 else f"error: {process.stderr}"

    def cancel_jobs(self) -> None:
        """Kills what the jobs have started, which would outlive the daemons."""
        self.run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
        self.run("scancel", f"--user={getpass.getuser()}")
        self._wait(
            "an empty queue", lambda: self.run("squeue", "--noheader", "--states=all", "--format=%T").count("ING") == 0
        )

    def logs(self) -> str:
        """Returns the last lines of the logs of the daemons."""
        return "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in sorted(self._folder.glob("*.log")))

    def _daemon(self, stack: contextlib.ExitStack, program: str, *arguments: str) -> None:
        path = self._packages / "usr" / "sbin" / program
        log = stack.enter_context((self._folder / f"{program}.{len(list(self._folder.glob('*.log')))}.log").open("w"))
        process = subprocess.Popen([path, *arguments], env=self.environment, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)

    def _wait(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_there():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited for {what} in vain:\n{self.logs()}")
            time.sleep(0.1)

    def _write_configuration(self) -> None:
        controller, first, second = _free_ports(3)
        host, user, folder = socket.gethostname(), getpass.getuser(), self._folder
        for name in ("state", *(f"spool.{node}" for node in self._nodes)):
            (folder / name).mkdir()
        node = f"NodeHostname={host} NodeAddr={host} CPUs=1 RealMemory=1 State=UNKNOWN"
        (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
PluginDir={self._plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
InactiveLimit=0
KillWait=60
SchedulerParameters=bf_interval=1,sched_interval=1
MinJobAge=600
NodeName={self._nodes[0]} {node} Port={first}
NodeName={self._nodes[1]} {node} Port={second}
PartitionName=all Nodes={",".join(self._nodes)} Default=YES MaxTime=INFINITE State=UP
""")


@contextlib.contextmanager
def running(packages: Path, folder: Path) -> Iterator[SlurmCluster]:
    """Starts a cluster whose files are in `folder`, and ends it."""
    cluster = SlurmCluster(packages, folder)
    with contextlib.ExitStack() as stack:
        cluster.start(stack)
        try:
            yield cluster
        finally:
            cluster.cancel_jobs()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
