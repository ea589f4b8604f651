"""A real Slurm cluster of N nodes on this one machine, for tests, and for trying one's own batch scripts by hand.

    python tests/slurm/slurm_cluster.py 2      # starts it, prints what to export, ends it on Ctrl-C

Everything lives in one new folder and goes away with the process that started it, even when that is killed; nothing
in /etc is read or written. As root with the rights to make namespaces each node has its own address, host name,
processes, /dev/shm and scratch disk, so that nodes fail on their own and fixed ports do not clash. Elsewhere (`plain`)
the nodes are only named apart. GPUs are pretended: Slurm grants them and sets CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NODE_SCRIPT = Path(__file__).with_name("node.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel", "setpriv")
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
READY_STATES = {"idle", "mix", "alloc", "comp"}

# Timeouts are short so that faults are noticed in seconds; hardware is pretended (config_overrides).
CONFIGURATION = """\
ClusterName=keyreid
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=5
CompleteWait=0
BatchStartTimeout=10
UnkillableStepTimeout=10
InactiveLimit=0
MinJobAge=3600
NodeName=DEFAULT CPUs={cpus} CoresPerSocket={cpus} RealMemory=64000 Gres=gpu:{gpus} Feature=a100 State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=01:00:00 State=UP DefMemPerCPU=100
PartitionName=main Default=YES PriorityTier=10 PreemptMode=off
PartitionName=preempt PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
"""


class ClusterError(Exception):
    """Slurm is not installed or does not start here; the message says why."""


class Cluster:
    """A private cluster, running between `with Cluster() as cluster:` and the end of the block.

    Attributes:
        nodes: the nodes' names.
        environment: what a client needs (`subprocess.run(..., env=cluster.environment)`).
        scratch: a folder that is each node's own disk (in mode plain: shared).
        isolated: nodes have namespaces of their own, so that `crash` is a power loss and fixed ports do not clash.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4, gpus: int = 2) -> None:
        absent = [program for program in PROGRAMS if not shutil.which(program, path=_search_path())]
        if absent:
            raise ClusterError(f"{', '.join(absent)} not found; launch/install-slurm installs Slurm")
        # A short path: Unix sockets below the scratch disk have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="kslurm-"))
        self.scratch = self.folder / "scratch"
        self.isolated = _can_isolate()
        # Where a node has no /etc/hosts of its own its name must resolve by itself.
        self.nodes = [f"n{i}" if self.isolated else f"127.0.0.10{i}" for i in range(1, nodes + 1)]
        self._processes: dict[str, subprocess.Popen] = {}
        self._subnet = _free_subnet() if self.isolated else "127.0.0"
        self._bridge = f"ks{self._subnet.split('.')[2]}"
        self._sizes = {"cpus": cpus, "gpus": gpus}
        inherited = {k: v for k, v in os.environ.items() if not re.match(r"(SLURM|SBATCH|SRUN|SLURMD)_", k)}
        self.environment = inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _search_path()}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            if self.isolated:
                _run("ip", "link", "add", self._bridge, "type", "bridge")
                _run("ip", "addr", "add", f"{self._subnet}.254/24", "dev", self._bridge)
                _run("ip", "link", "set", self._bridge, "up")
            self._spawn("slurmctld", "slurmctld", "-D", "-c", "-i", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self.start_node(node)
            self.wait_for_nodes(len(self.nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.crash(node)
        if controller := self._processes.pop("slurmctld", None):
            controller.terminate()
            _reap(controller)
        self._kill_environment({"SLURM_CONF": self.environment["SLURM_CONF"]})
        if self.isolated:
            subprocess.run(["ip", "link", "del", self._bridge], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start a node, for the first time or after `crash`."""
        number = self.nodes.index(node) + 1
        command = [str(NODE_SCRIPT), str(self.folder), node]
        if not self.isolated:
            self._spawn(node, *command)
            return
        process = self._spawn(node, "unshare", *NAMESPACES, *command, f"{self._subnet}.{number}")
        first = self._first_process(process)
        cable = f"{self._bridge}.{number}"
        subprocess.run(["ip", "link", "del", cable], stderr=subprocess.DEVNULL, check=False)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(first))
        _run("ip", "link", "set", cable, "master", self._bridge, "up")

    def crash(self, node: str) -> None:
        """Power loss: slurmd and every job process of the node die at once, and nobody is told."""
        process = self._processes.pop(node, None)
        if process is None:
            return
        if self.isolated:
            # Every process of a process namespace dies with its first.
            for child in _children(process.pid):
                _kill(child)
        process.kill()
        process.wait()
        if not self.isolated:
            self._kill_environment({"SLURM_CONF": self.environment["SLURM_CONF"], "SLURMD_NODENAME": node})

    def run(self, *command: str | Path, check: bool = True, **options: object) -> str:
        """Run a client command on the login node and return its standard output."""
        options = {"env": self.environment, "text": True, "timeout": 600} | options
        result = subprocess.run([str(word) for word in command], capture_output=True, check=False, **options)
        if check and result.returncode:
            raise ClusterError(f"{command} ended with {result.returncode}: {result.stdout}{result.stderr}")
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, NodeList, ..."""
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:_]+)=(\S*)", self.run("scontrol", "show", "job", "-o", job_id)))

    def wait(self, job_id: str, states: Sequence[str] = FINAL_STATES, seconds: float = 600) -> dict[str, str]:
        """Wait until a job is in one of the states (`sbatch --wait` looks only every 10 s).

        Raises:
            TimeoutError: it is not, or has ended otherwise; with its state and the end of its log.
        """
        deadline = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in states:
            if job["JobState"] in FINAL_STATES or time.monotonic() > deadline:
                log = Path(job["StdOut"])
                tail = log.read_text()[-2000:] if log.is_file() else "no log"
                raise TimeoutError(f"job {job_id} is {job['JobState']} ({job['Reason']}), not {states}: {tail}")
            time.sleep(0.1)
        return job

    def wait_for_nodes(self, count: int, seconds: float = 60, free_cpus: int = 0) -> None:
        """Wait until `count` nodes take jobs and have so many CPUs free."""
        deadline = time.monotonic() + seconds
        while True:
            lines = self.run("sinfo", "-h", "-N", "-o", "%N %t %C", check=False).splitlines()
            nodes = [re.split(r"[ /]", line) for line in lines]  # name, state, CPUs in use, idle, other, all
            ready = {node[0] for node in nodes if node[1] in READY_STATES and int(node[3]) >= free_cpus}
            if len(ready) == count:
                return
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                tails = "".join(f"\n{log.name}: {log.read_text()[-600:]}" for log in (self.folder / "log").iterdir())
                raise ClusterError(f"{len(ready)} of {count} nodes ready, ended: {dead or 'none'}{tails}")
            time.sleep(0.05)

    def _configure(self) -> None:
        for name in ("log", "state", "scratch", "spool", "dev"):
            (self.folder / name).mkdir()
        for i in range(self._sizes["gpus"]):
            (self.folder / "dev" / f"nvidia{i}").symlink_to("/dev/null")  # must be a character device
        host = socket.gethostname().split(".")[0]
        controller = f"{self._subnet}.254" if self.isolated else "127.0.0.1"
        port = _free_ports(len(self.nodes) + 1)
        addresses = {n: f"{self._subnet}.{i}" if self.isolated else n for i, n in enumerate(self.nodes, 1)}
        lines = [
            f"NodeName={node} NodeHostname={node if self.isolated else host} NodeAddr={address} Port={port + i}"
            for i, (node, address) in enumerate(addresses.items(), 1)
        ]
        files = {
            "slurm.conf": CONFIGURATION.format(
                folder=self.folder,
                host=host,
                controller=controller,
                port=port,
                user=_run("id", "-un").strip(),
                nodes="\n".join(lines),
                **self._sizes,
            ),
            "gres.conf": f"AutoDetect=off\nName=gpu File={self.folder}/dev/nvidia[0-{self._sizes['gpus'] - 1}]\n",
            "plugstack.conf": "",
            "hosts": "".join(
                f"{a} {n}\n" for n, a in {"localhost": "127.0.0.1", host: controller, **addresses}.items()
            ),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        }
        version = re.search(r"(\d+)\.(\d+)", _run("slurmctld", "-V"))
        if version and (int(version[1]), int(version[2])) >= (23, 11):
            files["cgroup.conf"] = "CgroupPlugin=disabled\n"  # unknown before, needed since
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def _spawn(self, name: str, *command: str) -> subprocess.Popen:
        # Jobs get the submitter's environment, so the daemons' own is bare.
        environment = {k: self.environment[k] for k in ("PATH", "SLURM_CONF")} | {"LANG": "C.UTF-8", "HOME": "/"}
        with (self.folder / "log" / f"{name}.err").open("wb") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    @staticmethod
    def _first_process(process: subprocess.Popen) -> int:
        """The first process of a node's namespaces, as soon as it is in them."""
        own = Path("/proc/self/ns/net").readlink()
        for _ in range(200):
            for child in _children(process.pid):
                try:
                    if Path(f"/proc/{child}/ns/net").readlink() != own:
                        return child
                except OSError:
                    break
            time.sleep(0.02)
        raise ClusterError("a node's namespaces did not start")

    @staticmethod
    def _kill_environment(values: dict[str, str]) -> None:
        """Kill the processes that carry these variables: without process namespaces jobs outlive their node."""
        wanted = {f"{key}={value}".encode() for key, value in values.items()}
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                carried = set(entry.read_bytes().split(b"\0"))
            except OSError:
                continue
            daemon_or_job = any(word.startswith(b"SLURMD_NODENAME=") for word in carried) or _name(entry) in PROGRAMS
            if wanted <= carried and daemon_or_job:
                _kill(int(entry.parent.name))


def _search_path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def _run(*command: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": _search_path()}
    )
    if result.returncode:
        raise ClusterError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def _can_isolate() -> bool:
    """Whether namespaces and virtual cables can be made; tried, because capabilities do not tell it."""
    probe = "mount -t tmpfs x /dev/shm && hostname probe && ip link add ksp type veth peer name ksq"
    result = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-c", probe],
        capture_output=True,
        check=False,
        env=os.environ | {"PATH": _search_path()},
    )
    return result.returncode == 0


def _free_subnet() -> str:
    used = _run("ip", "-4", "addr")
    return next(subnet for n in range(20, 250) if f"{(subnet := f'10.213.{n}')}." not in used)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports on which nobody listens, below the ports that clients are given."""
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            listening.add(int(line.split()[1].rsplit(":", 1)[1], 16))
    start = 20000 + os.getpid() % 500 * 20
    return next(p for p in range(start, 32000, 20) if listening.isdisjoint(range(p, p + count)))


def _children(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            yield from map(int, tasks.read_text().split())
        except OSError:
            continue


def _name(entry: Path) -> str:
    try:
        return entry.with_name("comm").read_text().strip()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap(process: subprocess.Popen) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """Run a cluster until Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster(nodes=int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        print(f"# nodes {', '.join(cluster.nodes)}; logs in {cluster.folder}/log; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    try:
        main()
    except ClusterError as error:
        sys.exit(f"slurm_cluster: {error}")
