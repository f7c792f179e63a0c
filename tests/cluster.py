"""A real SLURM controller and node on this machine, of this user: no root, no installation.

Debian's packages are unpacked, not installed. Where CI provides SLURM, ``EXPERTDIFF_SLURM`` names
the folder for them, and tests fail rather than skip when there is none.
"""

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = [
    "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins",
    "munge", "libmunge2", "libhwloc15", "liblua5.1-0",
]  # fmt: skip
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
PluginDir={libraries}/slurm-wlm
PlugStackConfig=/dev/null
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=86400
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:3 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1
PartitionName=high Nodes={host} MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501
SITE = """\
train=({options} --cpus-per-task={cpus_per_task})
evaluate=("${{train[@]}}")
setup() {{ unset LD_LIBRARY_PATH; export OMP_NUM_THREADS=1; {setup} }}
"""


class Unavailable(Exception):
    """SLURM's packages cannot be had here; says why."""


def unpacked() -> Path:
    """The folder of SLURM's unpacked packages, which are downloaded once.

    Raises:
        Unavailable: this is no Debian, or there is no network.
    """
    cache = Path(os.environ.get("EXPERTDIFF_SLURM", Path.home() / ".cache/expertdiff-slurm"))
    folder = cache / "unpacked"
    if folder.is_dir():
        return folder
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unavailable("no apt-get and dpkg to fetch SLURM's packages with")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        debs, whole = Path(temporary), Path(temporary) / "unpacked"
        got = subprocess.run(
            ["apt-get", "download", *PACKAGES], cwd=debs, capture_output=True, text=True
        )
        if got.returncode:
            raise Unavailable(f"apt-get download: {' '.join(got.stderr.split())[-300:]}")
        for deb in debs.glob("*.deb"):
            subprocess.run(["dpkg", "-x", deb, whole], check=True)
        for name in ("slurmctld", "slurmd", "slurmstepd"):
            # Under their own names, which end in -wlm, they drop the GPUs of a node.
            (whole / "usr/sbin" / name).symlink_to(f"{name}-wlm")
        with contextlib.suppress(OSError):  # another process was faster
            whole.rename(folder)
    return folder


class Cluster:
    """One node with 3 fake GPUs, a partition ``test``, and ``high``, whose jobs preempt those.

    Attributes:
        root: its own folder.
        environment: what its clients (sbatch, squeue, scontrol ..) need, and jobs inherit.
    """

    def __init__(self, root: Path, cpus: int = 6) -> None:
        self.root, packages = root, unpacked()
        self.packages = packages
        # A multi-arch folder, as x86_64-linux-gnu.
        self.libraries = next(packages.glob("usr/lib/*/slurm-wlm")).parent
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "log", "run", "dev", f"spool/{host}", "bin"):
            (root / name).mkdir(parents=True)
        for k in range(3):
            (root / f"dev/nvidia{k}").symlink_to("/dev/null")
        (root / "gres.conf").write_text(f"NodeName={host} Name=gpu File={root}/dev/nvidia[0-2]\n")
        self.configuration = root / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                host=host, user=getpass.getuser(), root=root, libraries=self.libraries,
                ports=_free_ports(2), cpus=cpus,
            )
        )  # fmt: skip
        os.setegid(pwd.getpwuid(os.getuid()).pw_gid)
        self.daemons: list[subprocess.Popen] = []
        for client in (packages / "usr/bin").iterdir():
            # The libraries are for SLURM alone: Python has its own.
            script = (
                f"#!/bin/sh\nSLURM_CONF={self.configuration} "
                f'LD_LIBRARY_PATH={self._library_path} exec {client} "$@"\n'
            )
            (root / "bin" / client.name).write_text(script)
            (root / "bin" / client.name).chmod(0o755)
        path = [root / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        self.environment = os.environ | {"PATH": ":".join(map(str, path))}

    @property
    def _library_path(self) -> str:
        return f"{self.libraries}/slurm-wlm:{self.libraries}"

    def start(self) -> None:
        """Starts controller and node; returns when jobs can run."""
        environment = os.environ | {
            "SLURM_CONF": str(self.configuration), "LD_LIBRARY_PATH": self._library_path
        }  # fmt: skip
        programs = self.packages / "usr/sbin"
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-d", programs / "slurmstepd"]):
            with open(self.root / "log" / f"{command[0]}.out", "w") as log:
                arguments = [programs / command[0], *command[1:], "-f", self.configuration]
                self.daemons.append(
                    subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
                )
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%T", check=False) == "idle", 60)

    def stop(self) -> None:
        """Cancels all jobs, then ends node and controller."""
        for job in self.queue():
            self.run("scancel", job, check=False)
        with contextlib.suppress(TimeoutError):
            self.wait_for(lambda: not self.queue(), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str | Path, check: bool = True) -> str:
        """What a client prints."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def queue(self) -> dict[str, str]:
        """The state of each job that waits or runs."""
        lines = self.run("squeue", "-h", "--array", "-o", "%i %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def ended(self) -> dict[str, list[tuple[str, str]]]:
        """State and exit code of each end of each job, in the order of time; by its id."""
        path = self.root / "log/jobcomp.txt"
        found: dict[str, list[tuple[str, str]]] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            facts = dict(part.split("=", 1) for part in line.split() if "=" in part)
            task = facts["JobId"]
            if facts.get("ArrayTaskId", "NONE") not in ("NONE", "NO_VAL"):
                task = f"{facts['ArrayJobId']}_{facts['ArrayTaskId']}"
            found.setdefault(task, []).append((facts["JobState"], facts["ExitCode"]))
        return found

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` tells of one job or task."""
        line = self.run("scontrol", "show", "job", job, "-o")
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    def hasten(self, job: str) -> None:
        """Lets a requeued job start now; SLURM would hold it for two minutes."""
        self.wait_for(lambda: self.queue().get(job) == "PENDING", 60)
        time.sleep(3)  # sooner, its credential is revoked
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def wait_for(self, condition, seconds: float = 300, every: float = 0.25) -> None:
        """Waits until `condition` holds.

        Raises:
            TimeoutError: it does not.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.root / "log/slurmctld.log"
                end = log.read_text()[-2000:] if log.is_file() else ""
                raise TimeoutError(f"after {seconds} s: {self.queue()}\n{end}")
            time.sleep(every)

    def site(self, options: str = "--gpus=1", cpus_per_task: int = 1, setup: str = "") -> Path:
        """A file of site settings."""
        path = self.root / f"site-{len(list(self.root.glob('site-*')))}.sh"
        path.write_text(SITE.format(options=options, cpus_per_task=cpus_per_task, setup=setup))
        return path


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(cpus: int = 6) -> Iterator[Cluster]:
    """A cluster that runs inside the block; in a short path, as its names have limits."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder), cpus)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


ROOT = Path(__file__).parents[1]
OPTIONS = [
    f"--config={ROOT}/tests/conf/toy.yaml",
    "--study.iterations=600",
    "--checkpoint.every_n_steps=20",
    "--trainer.val_check_interval=100",
    "--trainer.log_every_n_steps=20",
]
"""Over configs/toys/mdm.yaml: 3 experts and a baseline of some hundred steps."""


class Story:
    """A study on a cluster, as one lives it: what was done to it and when.

    Args:
        cluster: a running one.
        folder: of the study.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.began = time.monotonic()
        self.lines: list[str] = []

    def tell(self, what: str) -> None:
        """Writes a line of the log."""
        self.lines.append(f"{time.monotonic() - self.began:5.1f} s  {what}")

    def submit(self, *options: str, site: Path | None = None) -> list[str]:
        """The study, by the shipped submit.sh; returns the ids of its arrays and evaluation."""
        shipped = ROOT / "slurm/submit.sh"
        command = [shipped, ROOT / "configs/toys/mdm.yaml", *OPTIONS]
        where = [f"--study.root={self.folder.parent}", f"--study.name={self.folder.name}"]
        site = site or self.cluster.site()
        said = self.cluster.run(*command, *where, f"--slurm={site}", *options)
        lines = [line for line in said.splitlines() if line.startswith("submitted")]
        for line in lines:
            self.tell(line)
        return [line.split()[1].rstrip(":") for line in lines]

    def freeze(self, jobs: Sequence[str]) -> None:
        """Stops the Python of each job once it has a checkpoint, till a signal comes.

        They train for less than a second: what is done to them would come too late.
        """
        waiting = list(jobs)

        def frozen() -> bool:
            for job in list(waiting):
                folder = self.folder / job
                assert not (folder / "done.json").is_file(), f"{job} was too fast to be frozen"
                if any(folder.glob("checkpoints/*.json")):
                    self.signal(job, signal.SIGSTOP)
                    waiting.remove(job)
            return not waiting

        self.cluster.wait_for(frozen, every=0.02)
        self.tell(f"in the middle: {', '.join(f'{job} at {self.step(job)}' for job in jobs)}")

    def step(self, job: str) -> int:
        """Of a job's newest checkpoint."""
        names = sorted(path.name for path in self.folder.glob(f"{job}/checkpoints/*.ckpt"))
        return int(names[-1][5:-5]) if names else 0

    def preempt(self, n: int) -> list[str]:
        """Lets a more important job take the GPUs of n tasks; returns their ids."""
        before = {k: v for k, v in self.cluster.queue().items() if v == "RUNNING"}
        wrap = ["--partition=high", f"--gpus={n}", "--output=/dev/null", "--wrap=sleep 1"]
        self.cluster.run("sbatch", *wrap)
        taken: list[str] = []

        def preempted() -> bool:
            now = self.cluster.queue()
            taken[:] = [job for job in before if now.get(job) == "PENDING"]
            return len(taken) == n

        self.cluster.wait_for(preempted)
        self.tell(f"preempted: {', '.join(taken)}")
        return taken

    def signal(self, job: str, number: signal.Signals) -> None:
        """To the Python that trains a job, without its batch script."""
        config = str(self.folder / job / "job.yaml").encode()
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if config in process.read_bytes().split(b"\0"):
                    os.kill(int(process.parent.name), number)
                    return
        raise AssertionError(f"no process trains {job}")


def disturbed(cluster: Cluster, folder: Path) -> list[str]:
    """A study of 3 experts and a baseline with two preemptions and a SIGKILL; returns its log."""
    story = Story(cluster, folder)
    array, evaluation = story.submit()
    experts = ["expert-0", "expert-1", "expert-2"]
    story.freeze(experts)
    story.tell("expertdiff status:")
    command = [sys.executable, "-m", "expertdiff", "status", folder]
    story.lines += [f"         {line}" for line in cluster.run(*command).splitlines()]
    taken = story.preempt(2)
    (left,) = [f"expert-{k}" for k in range(3) if f"{array}_{k}" not in taken]
    story.signal(left, signal.SIGKILL)
    story.tell(f"SIGKILL to the Python of {left}")
    for task in taken:
        cluster.hasten(task)
    story.tell("their two minutes of waiting cut short")
    cluster.wait_for(lambda: f"{array}_3" in cluster.ended() and len(cluster.queue()) <= 1)
    story.tell("experts and baseline trained")
    cluster.wait_for(lambda: not cluster.queue())
    for job, ends in sorted(cluster.ended().items()):
        if job.partition("_")[0] in (array, evaluation):
            story.tell(f"{job}: {', then '.join(state for state, _ in ends)}")
    assert (folder / "report.html").is_file()
    story.tell("the report is written")
    return story.lines
