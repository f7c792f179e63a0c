"""A SLURM cluster, seen from the machine where one submits: its queue, and the scripts we send it.

Needs neither torch nor Lightning. What happens in a job stands in the scripts themselves.
"""

import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

SCRIPTS = Path(__file__).parent / "slurm"
"""What is sent to the cluster, and ``site.sh``, what each cluster wants to know."""


@dataclass(frozen=True)
class Queued:
    """A job of a study in the queue.

    Attributes:
        id: as scancel takes it, ``A_k`` for task k of an array.
        index: of the task, the line of its name in ``jobs.txt``; ``None`` for the evaluation.
        state: as SLURM calls it, in small letters.
        reason: why it waits.
    """

    id: str
    index: int | None
    state: str
    reason: str


def queue(study: Path) -> list[Queued] | None:
    """The jobs of a study that wait or run; ``None`` where there is no SLURM.

    Raises:
        ValueError: SLURM does not answer.
    """
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}"]
    found = []
    for line in _output([*command, "--format=%i|%K|%T|%r|%k"]).splitlines():
        number, index, state, reason, comment = line.split("|", 4)
        if comment.strip() == _comment(study):
            k = int(index) if index.isdecimal() else None
            found.append(Queued(number, k, state.lower(), reason))
    return found


@dataclass
class Submission:
    """Sends the jobs of a study to the queue: all, or none when one is refused.

    Args:
        study: its folder.
        site: the file of the cluster's settings, as the shipped ``site.sh``.
        dry_run: print the commands instead.
    """

    study: Path
    site: Path
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.ids: list[str] = []
        if not self.site.is_file():
            raise ValueError(f"{self.site} does not exist: give a copy of {SCRIPTS / 'site.sh'}")
        if not self.dry_run and not shutil.which("sbatch"):
            raise ValueError(
                "there is no sbatch here: submit from a login node of the cluster, see the "
                "commands with --dry-run, or launch without --slurm"
            )

    def train(self, indices: Sequence[int], at_once: int | None, after: Sequence[str]) -> str:
        """Submits an array of the training jobs in these lines of ``jobs.txt``; returns its id."""
        array = _ranges(indices) + (f"%{at_once}" if at_once else "")
        options = [f"--array={array}", f"--output={self.study}/slurm/%A_%a.log"]
        return self._submit("experts", "train", options, after, str(len(indices)))

    def evaluate(self, after: Sequence[str]) -> str:
        """Submits the evaluation; returns its id."""
        options = [f"--output={self.study}/slurm/evaluate-%j.log"]
        return self._submit("evaluate", "evaluate", options, after)

    def _submit(
        self, script: str, kind: str, options: list[str], after: Sequence[str], *arguments: str
    ) -> str:
        options += [f"--job-name={self.study.name}-{script}", f"--comment={_comment(self.study)}"]
        if after:
            options.append(f"--dependency=afterok:{':'.join(after)}")
        paths = [SCRIPTS / f"{script}.sbatch", self.site, self.study]
        site = _site_options(self.site, kind)  # last, so that they win
        command = ["sbatch", "--parsable", *options, *site, *map(str, paths), *arguments]
        if self.dry_run:
            print(" ".join(f"'{part}'" if " " in part else part for part in command))
            self.ids.append(f"<{script} {len(self.ids) + 1}>")
            return self.ids[-1]
        (self.study / "slurm").mkdir(parents=True, exist_ok=True)
        try:
            # With the cluster's name behind a semicolon, where there are several.
            self.ids.append(_output(command).strip().partition(";")[0])
        except ValueError:
            if self.ids:
                subprocess.run(["scancel", *self.ids], check=False)
            raise
        return self.ids[-1]


def _comment(study: Path) -> str:
    """By which the jobs of a study are known in the queue."""
    return f"expertdiff:{study.resolve()}"


def _site_options(site: Path, kind: str) -> list[str]:
    """The options of sbatch that a site's file gives for a kind of job."""
    script = f'source "$1" && for option in "${{{kind}[@]}}"; do printf "%s\\0" "$option"; done'
    return _output(["bash", "-c", script, "bash", str(site)]).split("\0")[:-1]


def _output(command: list[str]) -> str:
    # Jobs inherit this: without a word in site.sh they find the Python that submitted them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"{command[0]} ended with exit code {done.returncode}: {said}")
    return done.stdout


def _ranges(indices: Sequence[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5."""
    parts = []
    for _, group in groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        parts.append("-".join(map(str, members[:1] + members[1:][-1:])))
    return ",".join(parts)
