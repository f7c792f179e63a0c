"""Processes of a study on this machine, several at a time, with their progress in one terminal."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from tqdm import tqdm

from expertdiff import checkpoints
from expertdiff.files import write_text
from expertdiff.metrics import Progress

INTERRUPTED = 75
"""Exit code of a job that stopped on request and can be resumed (EX_TEMPFAIL)."""


@dataclass
class Job:
    """One process of a study: a training or a test.

    Attributes:
        name: shown to the user.
        verb: ``fit`` or ``test``.
        config: the resolved configuration it runs with.
        folder: its log and results.
        steps: how many optimizer steps or batches it takes.
    """

    name: str
    verb: str
    config: dict[str, Any]
    folder: Path
    steps: int
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def command(self) -> list[str]:
        """What to type to run or resume it by hand."""
        return ["expertdiff", self.verb, "--config", str(self.folder / "job.yaml")]

    @property
    def gpus(self) -> int:
        """How many it uses, where there are any."""
        trainer = self.config["trainer"]
        devices = trainer.get("devices")
        counted = isinstance(devices, int) and devices > 0 and trainer.get("accelerator") != "cpu"
        return devices if counted else 1

    @property
    def log(self) -> Path:
        """Everything it prints."""
        return self.folder / "log.txt"

    def write(self) -> None:
        """Writes what `command` runs with."""
        write_text(self.folder / "job.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def start(self, environment: dict[str, str]) -> None:
        """Starts the process, in a session of its own: only we pass signals on to it."""
        self.write()
        log: TextIO
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def why(self, lines: int = 5) -> str:
        """The last lines of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        # A progress bar rewrites its line with carriage returns: keep what was shown last.
        shown = [line.rsplit("\r", 1)[-1].strip() for line in text.rstrip().splitlines()]
        return "\n".join(f"    {line}" for line in [line for line in shown if line][-lines:])


def train(jobs: list[Job], parallel: int | None) -> None:
    """Runs those that are not finished, the longest first."""
    unfinished = [job for job in jobs if not finished(job)]
    for job in jobs:
        if job not in unfinished:
            print(f"{job.name}: finished before ({job.steps} steps)")
    run(sorted(unfinished, key=lambda job: -job.steps), parallel)


def finished(job: Job) -> bool:
    """Whether both the record and a whole checkpoint say so."""
    if not (job.folder / "done.json").is_file():
        return False
    newest = checkpoints.newest(job.folder / "checkpoints")
    return newest is not None and checkpoints.step_of(newest) >= job.steps


def run(jobs: list[Job], parallel: int | None = None) -> None:
    """Runs jobs as processes, several at a time, with their progress in one terminal.

    A job that fails leaves the others running. SIGTERM, a closed terminal or Ctrl-C stop all jobs,
    each with a checkpoint.

    Raises:
        ValueError: `parallel` is below 1, or a job wants more GPUs than there are.
        SystemExit: after all have ended, if any failed or was interrupted.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel {parallel} runs nothing: give 1 or more jobs at a time")
    if not jobs:
        return
    slots = _slots(jobs, parallel)
    waiting, running = list(jobs), {}
    display = Display(jobs)
    handlers = {n: signal.signal(n, _as_interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or running:
            while waiting and len(running) < len(slots):
                slot = next(s for s in range(len(slots)) if s not in running)
                running[slot] = waiting.pop(0)
                running[slot].start(slots[slot])
            time.sleep(1)
            for slot, job in list(running.items()):
                code = job.process.poll()
                display.update(job, code)
                if code is not None:
                    del running[slot]
    except KeyboardInterrupt:
        print("\nstopping: each job saves a checkpoint; the same command goes on from there")
        raise SystemExit(INTERRUPTED) from None
    finally:  # whatever happened, no job goes on alone
        for number, handler in handlers.items():
            signal.signal(number, handler)
        started = [job for job in running.values() if job.process]
        for job in started:  # a test has nothing to save, and Lightning would let it go on
            job.process.send_signal(signal.SIGTERM if job.verb == "fit" else signal.SIGKILL)
        for job in started:
            job.process.wait()
        display.close()
    _complain([job for job in jobs if job.process.returncode])


def _complain(failed: list[Job]) -> None:
    for job in failed:
        code = job.process.returncode
        print(f"\n{job.name} failed with exit code {code}; the end of {job.log}:\n{job.why()}")
        print(f"  resume it with `{' '.join(job.command)}`, or all with this launch command")
    if failed:
        # "Interrupted" only if nothing worse happened: a batch script would start it again.
        codes = [job.process.returncode for job in failed]
        codes = [code if code > 0 else 128 - code for code in codes]  # of a signal, as a shell does
        raise SystemExit(max((c for c in codes if c != INTERRUPTED), default=INTERRUPTED))


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _slots(jobs: list[Job], parallel: int | None) -> list[dict[str, str]]:
    """The environment of each place where a job can run."""
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        each = max(job.gpus for job in jobs)
        if each > gpus:
            raise ValueError(
                f"trainer.devices {each} are more than the {gpus} GPUs here: give at most {gpus}"
            )
        # More jobs than the GPUs have room for share them in turn.
        places = [range(i * each, (i + 1) * each) for i in range(parallel or gpus // each)]
        return [
            {"CUDA_VISIBLE_DEVICES": ",".join(visible[n % gpus] for n in place)} for place in places
        ]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    at_once = min(len(jobs), parallel or cores)
    return [{"OMP_NUM_THREADS": str(max(1, cores // at_once))}] * at_once


class Display:
    """The progress of several jobs: bars on a terminal, a line now and then elsewhere."""

    EVERY = 20.0
    BAR = "{desc} {bar:30} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"

    def __init__(self, jobs: list[Job]) -> None:
        self.bars: dict[str, tqdm] = {}
        self.printed = dict.fromkeys((job.name for job in jobs), time.monotonic())
        if sys.stdout.isatty():
            width = max(len(job.name) for job in jobs)
            for at, job in enumerate(jobs):
                label = job.name.rjust(width)
                self.bars[job.name] = tqdm(
                    total=job.steps, desc=label, position=at, file=sys.stdout, bar_format=self.BAR
                )

    def update(self, job: Job, code: int | None) -> None:
        """Shows where a job is; `code` is its exit code once it has ended."""
        progress = Progress.of(job.folder)
        step, word = progress.step, progress.words
        if code is not None:
            word = "done" if code == 0 else f"FAILED ({code})"
        if bar := self.bars.get(job.name):
            bar.set_postfix_str(word, refresh=False)
            bar.n = step
            bar.refresh()
        elif code is not None or time.monotonic() - self.printed[job.name] > self.EVERY:
            self.printed[job.name] = time.monotonic()
            print(f"{job.name}: step {step} of {job.steps}, {word}", flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        for bar in self.bars.values():
            bar.close()
