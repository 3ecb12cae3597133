"""A real Slurm cluster of a few nodes on this one machine, for the length of a test session.

Each node is a slurmd in namespaces of its own (host name, mounts, processes), so that `hostname` and name look-up
answer as on a real node, and so that ending the first process of a node ends everything that ever ran on it: that is
`power_off`, and it is how nothing outlives the cluster, even where the test session itself is killed.
"""

import os
import random
import re
import shlex
import shutil
import socket
import string
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Folders of the daemons, which are seldom in a user's PATH."""

FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})
CGROUPS = Path("/sys/fs/cgroup")
GRACE_SECONDS = 20
GPUS = "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
"""Two GPUs in name only: slurmd wants a device file for each."""

CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={name}ctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
# what is said here counts, not the hardware found
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=8
SlurmdTimeout={node_timeout}
MessageTimeout=10
TCPTimeout=2
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""

FOLLOW = ("setpriv", "--pdeathsig", "KILL", "--")
"""Makes a process end when the one that started it does."""

ENTER = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf; shift 2'


class ClusterError(RuntimeError):
    """The cluster, or a job on it, is not where it should be by now; the message ends with the daemons' last lines."""


@dataclass(frozen=True)
class Job:
    """A job as `scontrol show job` shows it at one moment."""

    fields: Mapping[str, str]

    @property
    def state(self) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED` ..."""
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        """The number of times that the job went back to the queue."""
        return int(self.fields["Restarts"])

    @property
    def exit_code(self) -> int:
        """The batch script's exit status."""
        return int(self.fields["ExitCode"].partition(":")[0])


def why_not() -> str | None:
    """The reason why no cluster can be started on this machine, or None where it can."""
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch", "unshare") if _which(tool) is None]
    if missing:
        return f"Slurm is not installed here ({', '.join(missing)} missing; Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a Slurm cluster of several nodes on one machine needs root"
    trial = subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return None if trial.returncode == 0 else f"no namespaces on this machine: {trial.stderr.strip()}"


def choose_proctrack() -> str:
    """`cgroup`, as on most real clusters, where the freezer can be written; else `pgid`.

    Never `linuxproc`: it hands a step's signal to every descendant, so that scripts look right that no other cluster
    would stop in time.
    """
    probe = CGROUPS / "freezer" / f"probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return "pgid"
    return "cgroup"


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Return as soon as `condition` holds; raises `ClusterError` naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.1)


class Cluster:
    """munged, slurmctld and `size` nodes; a context manager that starts them and leaves nothing behind.

    `root`: an empty folder for state, logs and sockets. `proctrack` decides whom a signal to a step reaches: with
    cgroup only the process that srun started, with pgid its process group; torchrun's workers are in neither.
    Partitions: `main`, and `urgent`, whose jobs put those of `main` back into the queue. Each node has `cpus` CPUs and
    two GPUs in name only.
    """

    def __init__(
        self, root: Path, *, size: int = 2, cpus: int = 16, proctrack: str | None = None, node_timeout: int = 10
    ) -> None:
        self.root = root
        self.name = "c" + "".join(random.choices(string.ascii_lowercase, k=6))
        self.nodes = [f"{self.name}n{index}" for index in range(1, size + 1)]
        self.proctrack = proctrack or choose_proctrack()
        self._cpus = cpus
        self._node_timeout = node_timeout
        self._processes: dict[str, psutil.Process] = {}
        self._starter: subprocess.Popen[str] | None = None
        self._starting = threading.Lock()
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        self._environment["SLURM_CONF"] = str(root / "slurm.conf")

    def __enter__(self) -> Self:
        try:
            self._write_configuration()
            self._start_starter()
            self._start_munged()
            self._start_in_namespaces(f"{self.name}ctl", "slurmctld", "-D")
            for node in self.nodes:
                self.power_on(node)
            for node in self.nodes:
                self.wait_for_node(node, "idle", 30)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster and remove the control groups that slurmd made."""
        for name in list(self._processes):
            self._end(name)
        if self._starter is not None:
            self._starter.communicate(timeout=10)
        for node in self.nodes:
            for folder, _, _ in os.walk(CGROUPS / "freezer" / f"slurm_{node}", topdown=False):
                Path(folder).rmdir()

    # ---- nodes

    def power_off(self, node: str) -> None:
        """Take the node's power away: slurmd, steps and everything they started are gone at once."""
        self._end(node)

    def power_on(self, node: str) -> None:
        """Start the node; it reports to the controller as freshly booted."""
        self._start_in_namespaces(node, "slurmd", "-D", "-b", "-N", node)

    def wait_for_node(self, node: str, state: str, seconds: float) -> None:
        """Wait until `sinfo` shows the node in `state`, `idle` or `down` for instance."""
        try:
            wait_until(lambda: self._node_state(node) == state, f"{node} is {state}", seconds)
        except ClusterError as error:
            raise ClusterError(f"{error}{self._logs()}") from None

    # ---- jobs

    def run(self, *command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Run one of Slurm's commands with `variables` in its environment; returns what it printed.

        Raises `ClusterError` where it fails.
        """
        environment = self._environment | variables
        done = subprocess.run(command, env=environment, cwd=cwd, text=True, capture_output=True, timeout=30)
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(map(str, command))}: {done.stderr.strip()}{self._logs()}")
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Submit a job with `sbatch`'s own `arguments`; returns its id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables)

    def job(self, job_id: str) -> Job:
        """The state of the job now."""
        return Job(dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job_id))))

    def wait_for_job(self, job_id: str, *states: str, seconds: float) -> Job:
        """Wait until the job is in one of `states`, by default a final one.

        Raises `ClusterError` when it ends in another state, or is in none of them after `seconds`.
        """
        wanted = frozenset(states) or FINAL_STATES
        end = time.monotonic() + seconds
        while (job := self.job(job_id)).state not in wanted:
            if job.state in FINAL_STATES or time.monotonic() > end:
                raise ClusterError(f"job {job_id} is {job.state}, wanted {' or '.join(sorted(wanted))}{self._logs()}")
            time.sleep(0.4)
        return job

    def cancel_all(self) -> None:
        """End all jobs and wait until the nodes that are up are free."""
        self.run("scancel", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader"), "all jobs are gone", 30)

    # ---- daemons

    def _write_configuration(self) -> None:
        if len(str(self.root / "munge.sock.lock")) > 100:
            raise ClusterError(f"{self.root} is too long for a socket's name: use a shorter --basetemp")
        network = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        addresses = {node: f"{network}.{index}" for index, node in enumerate(self.nodes, start=10)}
        controller = {"localhost": "127.0.0.1", f"{self.name}ctl": "127.0.0.1"}
        hosts = (controller | addresses).items()
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts))
        # names come from that file alone: a name server out of reach would cost seconds at every look-up
        services = Path("/etc/nsswitch.conf").read_text() if Path("/etc/nsswitch.conf").exists() else ""
        kept = [line for line in services.splitlines() if not line.startswith("hosts:")]
        (self.root / "nsswitch.conf").write_text("\n".join([*kept, "hosts: files", ""]))
        nodes = [
            f"NodeName={node} NodeAddr={address} Port={_free_port(address)} CPUs={self._cpus} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={self._cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2"
            for node, address in addresses.items()
        ]
        configuration = CONFIGURATION.format(
            name=self.name,
            root=self.root,
            port=_free_port("127.0.0.1"),
            proctrack=self.proctrack,
            node_timeout=self._node_timeout,
            nodes="\n".join(nodes),
            grace=GRACE_SECONDS,
        )
        (self.root / "slurm.conf").write_text(configuration)
        (self.root / "gres.conf").write_text(GPUS)
        if self.proctrack == "cgroup":
            (self.root / "cgroup.conf").write_text(
                f"CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint={CGROUPS}\n"
            )
        (self.root / "state").mkdir()

    def _start_munged(self) -> None:
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(random.randbytes(1024))
        socket_name = self.root / "munge.sock"
        # --force: the folders above, /tmp among them, may be writable for others
        self._start(
            "munged",
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_name}"]
            + [f"--{name}-file={self.root}/munged.{name}" for name in ("pid", "log", "seed")]
            + ["--num-threads=4", "--origin=127.0.0.1"],
        )
        wait_until(socket_name.is_socket, "munged listens", 10)

    def _start_in_namespaces(self, host: str, *command: str) -> None:
        # the shell stays as the node's first process: it collects orphans, which slurmd would not
        script = f'{ENTER}; "$@"; exit $?'
        namespaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(host, [*namespaces, "bash", "-c", script, "node", host, str(self.root), *command])

    def _start(self, name: str, command: Sequence[str]) -> None:
        starter = self._starter
        assert starter is not None
        assert starter.stdin is not None
        assert starter.stdout is not None
        log = shlex.quote(str(self.root / f"{name}.out"))
        with self._starting:
            starter.stdin.write(f"{shlex.join([*FOLLOW, *command])} </dev/null >>{log} 2>&1 & echo $!\n")
            starter.stdin.flush()
            self._processes[name] = psutil.Process(int(starter.stdout.readline()))

    def _start_starter(self) -> None:
        """The shell that starts all daemons: they end with it, and it ends with this process, however that ends."""
        self._starter = subprocess.Popen(
            [*FOLLOW, "bash"],
            env=self._environment | {"PATH": f"{PATH}:{self._environment['PATH']}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.root,
            start_new_session=True,
        )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        # a namespace is empty once its first process is gone, and that one is collected last
        with suppress(psutil.NoSuchProcess):
            first = [] if name == "munged" else process.children()
            for child in first:
                child.kill()
            psutil.wait_procs(first, timeout=10)
            process.kill()
            process.wait(10)

    def _node_state(self, node: str) -> str:
        return self.run("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%T").strip("*")

    def _logs(self) -> str:
        tails = {log.name: log.read_text().splitlines()[-10:] for log in sorted(self.root.glob("*.out"))}
        return "".join("\n".join(["", f"-- {name}", *lines]) for name, lines in tails.items())


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{PATH}")


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port
