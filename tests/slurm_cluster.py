"""A real Slurm of two nodes on this machine: munged, slurmctld and a slurmd a node, in a folder of their own, on free ports.

with cluster(folder) as slurm:
    job = slurm.submit("examples/slurm/train.sbatch", "--lr", "1e-6")
    slurm.wait(job, "COMPLETED")
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_pz.engine.sglang.fleet import free_port

ROOT = Path(__file__).parents[1]
NODES = ("n1", "n2", "n3")  # jobs take two
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credentials have expired: 120 s by default.
AuthInfo=cred_expire=5,socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdTimeout={slurmd_timeout}
MessageTimeout=60
KillWait=60
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Whatever the machine has: a node is never found smaller than it is said to be.
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1 Gres=gpu:8"
START_TIMEOUT_S = 90.0


def missing() -> str:
    """Why no Slurm can be started here; empty if it can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return (
        f"no {', '.join(lacking)} here: tools/setup_env.sh test installs Debian's slurm-wlm and munge as root"
        if lacking
        else ""
    )


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


class Slurm:
    """A running cluster.

    Args:
        folder: of the configuration, logs and spools.
        env: for every client; it names the configuration.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground, its words in `name`.out."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def runs(self) -> bool:
        """True; an error where a daemon has ended."""
        for name, daemon in self._daemons.items():
            assert daemon.poll() is None, f"{name}: {(self.folder / f'{name}.out').read_text()[-2000:]}"
        return True

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node, anew where it was killed."""
        self.start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """`kill -9` of a node's slurmd and of all that it has started: the machine is lost."""
        daemon = self._daemons[name]
        daemon.kill()
        daemon.wait()
        kill_all(f"SLURM_CONF={self.env['SLURM_CONF']}", f"SLURMD_NODENAME={name}")

    def call(self, *command: str) -> str:
        """What a client says; it must succeed."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """Of the nodes; empty while the controller does not answer."""
        command = ["sinfo", "--noheader", "--Node", "--format=%t"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout.split()

    def submit(self, *command: str, **variables: str) -> str:
        """Number of a job that `sbatch` has taken."""
        env = self.env | variables
        done = subprocess.run(
            ["sbatch", "--parsable", *command],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, number: str, *states: str, timeout_s: float = 240.0, told: Callable[[], str] | None = None
    ) -> dict[str, str]:
        """The job's fields as soon as it is in one of `states`; it must not end in another before.

        Args:
            told: for a failure's message.
        """
        told = told or self.told
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + timeout_s
        while (found := self.job(number))["JobState"] not in states:
            assert found["JobState"] not in ended, f"{found}\n{told()}"
            assert time.monotonic() < deadline, f"{found}\n{told()}"
            time.sleep(0.3)
        return found

    def told(self) -> str:
        """Ends of the daemons' logs, for a failure's message."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log")
        )

    def stop(self) -> None:
        """End all jobs and daemons; nothing is left when this returns."""
        kill_all(f"SLURM_CONF={self.env['SLURM_CONF']}")
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()


def wait_until(is_so: Callable[[], bool], timeout_s: float, why: Callable[[], str] = str) -> None:
    """Look again and again."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"it did not happen in {timeout_s:.0f} s {why()}"
        time.sleep(0.1)


def kill_all(*variables: str) -> None:
    """SIGKILL for what `processes` finds, until it finds nothing."""
    while found := processes(*variables):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def processes(*variables: str) -> list[int]:
    """Processes other than this one with all of `variables` ("NAME=value") in the environment that they were started with."""
    wanted, found = {v.encode() for v in variables}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def cluster(folder: Path, slurmd_timeout_s: int = 20) -> Iterator[Slurm]:
    """A Slurm whose nodes are idle; nothing of it is left after the block.

    Args:
        folder: for all its files; not longer than a socket's name may be.
        slurmd_timeout_s: after so many seconds a node that does not answer is down.
    """
    folder.chmod(0o755)  # munged insists
    host = socket.gethostname().partition(".")[0]
    nodes = [NODE.format(name=name, host=host, port=free_port("127.0.0.1")) for name in NODES]
    user, ctld_port = getpass.getuser(), free_port("127.0.0.1")
    conf = folder / "slurm.conf"
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    conf.write_text(
        CONF.format(
            host=host,
            user=user,
            ctld_port=ctld_port,
            folder=folder,
            slurmd_timeout=slurmd_timeout_s,
            nodes="\n".join(nodes),
        )
    )
    for gpu in range(8):
        (folder / f"gpu{gpu}").symlink_to("/dev/null")  # it must be a device
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "TORCHELASTIC_"))
    }
    slurm = Slurm(folder, kept | {"SLURM_CONF": str(conf), "PATH": _path()})
    try:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        slurm.start("munged", "munged", "--foreground", f"--seed-file={folder}/munged.seed", *options)
        wait_until(lambda: slurm.runs() and (folder / "munge.socket").exists(), START_TIMEOUT_S)
        slurm.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            slurm.start_node(node)
        wait_until(lambda: slurm.runs() and slurm.states() == ["idle"] * len(NODES), START_TIMEOUT_S, slurm.told)
        yield slurm
    finally:
        slurm.stop()
