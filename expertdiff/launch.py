"""Run a study on this machine: every job its own process; then stitch, test and report.

Safe to run again: finished work is kept, unfinished work goes on from its checkpoints.
"""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

import torch
import yaml
from tqdm import tqdm

from expertdiff import checkpoints
from expertdiff.analysis.mixes import Mixer
from expertdiff.budgets import Adaptive, Budget, as_budget
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.describe import build, describe, differences
from expertdiff.diffusion.partition import Partition
from expertdiff.evaluation.judge import Judge
from expertdiff.files import read_json, sha256_of, write_json, write_text
from expertdiff.loggers import read_metrics
from expertdiff.report import write_report
from expertdiff.study import Study

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
    def log(self) -> Path:
        """Everything it prints."""
        return self.folder / "log.txt"

    def start(self, environment: dict[str, str]) -> None:
        """Starts the process, in a session of its own: only we pass signals on to it."""
        write_text(self.folder / "job.yaml", yaml.safe_dump(self.config, sort_keys=False))
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

    def progress(self) -> tuple[int, str]:
        """The step it has reached, and a word about how it goes."""
        lines = read_metrics(self.folder / "metrics.jsonl", last=8192)
        words = []
        for key, text in (("train/loss", "loss {:.4f}"), ("steps_per_second", "{:.1f} it/s")):
            words += [text.format(line[key]) for line in reversed(lines) if key in line][:1]
        return max((line["step"] for line in lines), default=0), ", ".join(words)

    def why(self, lines: int = 5) -> str:
        """The last lines of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        # A progress bar rewrites its line with carriage returns: keep what was shown last.
        shown = [line.rsplit("\r", 1)[-1].strip() for line in text.rstrip().splitlines()]
        return "\n".join(f"    {line}" for line in [line for line in shown if line][-lines:])


def launch(
    study: Study,
    config: dict[str, Any],
    data: dict[str, Any],
    job: str,
    parallel: int | None = None,
) -> Path:
    """Trains every job of a study that is not finished, then stitches, tests and reports.

    Args:
        study: names, folders, budgets.
        config: the resolved configuration of ``fit``; plain data.
        data: what the training data are (`Data.identity`).
        job: the name of the only job, where the method trains the whole chain in one.
        parallel: jobs at a time; by default one a GPU, or one a CPU core.

    Returns:
        The path of the report.

    Raises:
        ValueError: the folder holds another study, nothing says how the models are to be judged,
            or several seeds are to be trained in one job.
        SystemExit: a job failed or was interrupted; the code is that of the job.
    """
    arguments = config["model"]["init_args"]
    partition = build(arguments["partition"], Partition)
    budget = as_budget(study.budget)
    if arguments["seeds"] is not None:
        raise ValueError(
            f"model.seeds {arguments['seeds']} cannot be launched, because a study has one seed: "
            "set seed_everything, or train them with `expertdiff fit`"
        )
    if study.evaluation is None or study.evaluation.judge is None:
        raise ValueError(
            "study.evaluation names no judge: say how the models are to be judged, for example "
            "with --study.evaluation.judge Pixels"
        )
    experts = "expert" in arguments
    jobs = []
    if experts:
        for i, steps in enumerate(study.budgets(partition)):
            jobs.append(_fit_job(study, config, f"expert-{i}", steps, expert=i))
        if study.baseline:
            jobs.append(_fit_job(study, config, "baseline", study.iterations))
    else:
        jobs.append(_fit_job(study, config, job, study.iterations))
    record = _record(study, config, data, partition, jobs)
    rounds = None
    if experts and isinstance(budget, Adaptive):
        rounds = Rounds(study, config, record["settings"], budget, partition, parallel)
    write_json(study.folder / "study.json", record)  # all has been accepted

    whole = [job for job in jobs if not job.name.startswith("expert-")]
    parts = [job for job in jobs if job not in whole]
    if rounds:
        rounds.train(parts)
        train(whole, parallel)  # after the rounds, none of which has to wait for it
    else:
        train(jobs, parallel)

    trained = {"stitched": parts} | {job.name: [job] for job in whole}
    tests = []
    for name, sources in trained.items():
        if sources:
            folder = study.folder / "bundles" / name
            bundle = Bundle.stitch([job.folder for job in sources], folder)
            tests.append(_test_job(study, config, name, bundle))
    # On a CPU one after another: the first leaves the reference's statistics to the next.
    at_once = parallel if torch.cuda.is_available() else 1
    untested = [job for job in tests if not _tested(job)]
    for job in untested:  # an old result must not stand beside a new configuration
        (job.folder / "metrics.json").unlink(missing_ok=True)
    run(untested, at_once)
    report = write_report(study.folder)
    print(f"report: {report}")
    return report


def train(jobs: list[Job], parallel: int | None) -> None:
    """Runs those that are not finished, the longest first."""
    unfinished = [job for job in jobs if not finished(job)]
    for job in jobs:
        if job not in unfinished:
            print(f"{job.name}: finished before ({job.steps} steps)")
    run(sorted(unfinished, key=lambda job: -job.steps), parallel)


class Rounds:
    """Experts trained in rounds, after each of which an adaptive budget is decided anew.

    ``ledger.json`` holds every decision and what it was decided by. The experts as they stood after
    round k are a bundle in ``rounds/k``.

    Args:
        study: names, folders, total iterations.
        config: the resolved configuration of ``fit``.
        settings: whatever else makes the study this one, plain data.
        budget: the rule.
        partition: the experts' intervals.
        parallel: jobs at a time.

    Raises:
        ValueError: a learning rate that depends on the length of the training, check points with a
            judge whose distance may be below 0, or a ledger of another study.
    """

    def __init__(
        self,
        study: Study,
        config: dict[str, Any],
        settings: dict[str, Any],
        budget: Adaptive,
        partition: Partition,
        parallel: int | None,
    ) -> None:
        self.study, self.config, self.budget = study, config, budget
        self.partition, self.parallel = partition, parallel
        scheduler = config["model"]["init_args"]["lr_scheduler"]
        if scheduler and scheduler.get("init_args", {}).get("T_max") == 0:
            raise ValueError(
                "an adaptive budget cannot have a learning rate that ends with the run (T_max 0), "
                "because its length is not known at the start: choose another lr_scheduler"
            )
        if budget.check_points and study.evaluation.judge.estimate:
            raise ValueError(
                f"check_points {list(budget.check_points)} need a distance that is never below 0, "
                f"which {study.evaluation.judge.metric} of "
                f"{type(study.evaluation.judge).__name__} may be: choose another "
                "study.evaluation.judge, or check_points []"
            )
        self.path = study.folder / "ledger.json"
        # Without the steps, which are those of a baseline too that may be added later.
        lasting = {key: value for key, value in settings.items() if key != "steps"}
        start = budget.start(partition, study.iterations, lasting)
        self.ledger = read_json(self.path) if self.path.is_file() else [start]
        budget.replay(self.ledger, start)

    def train(self, experts: list[Job]) -> None:
        """All rounds; sets the steps of each expert's job."""
        while True:
            last, now = self.ledger[-1], len(self.ledger)
            for job, steps in zip(experts, last["until"]):
                job.steps = steps
                # Validated once, at the end of the round: that is what is decided by.
                job.config["trainer"]["val_check_interval"] = steps
                job.config["study"]["budget"] = last["until"]
            print(f"round {now}: experts to {last['until']} steps")
            train(experts, self.parallel)
            Bundle.stitch([job.folder for job in experts], self._round(now))
            if last["until"] == last["budgets"]:
                self._tell(experts)
                return
            self.ledger.append(self.budget.next(self.ledger, self._observed(experts)))
            write_json(self.path, self.ledger)

    def _tell(self, experts: list[Job]) -> None:
        """What was decided in the end, for the report."""
        path = self.study.folder / "study.json"
        record = read_json(path)
        for job in experts:
            record["jobs"][job.name]["iterations"] = job.steps
        write_json(path, record)

    def _round(self, k: int) -> Path:
        return self.study.folder / "rounds" / str(k)

    def _observed(self, experts: list[Job]) -> dict[str, Any]:
        """What the next decision needs: losses, and at a check point distances."""
        last, now = self.ledger[-1], len(self.ledger)
        losses = [_validated(job, e) for e, job in enumerate(experts)]
        if last["check"] is None:
            return {"losses": losses}
        before = next(
            k for k, entry in enumerate(self.ledger, 1) if entry["until"] == last["check"]
        )
        then, ahead = (
            [self._round(k) / f"{e:02d}.safetensors" for e in range(len(experts))]
            for k in (before, now)
        )
        mixes = {"all": then}
        for e in range(len(experts)):
            mixes[str(e)] = [*then[:e], ahead[e], *then[e + 1 :]]
        scores = self._mixer().score(mixes)
        distances = {name: mean(next(iter(score.values()))) for name, score in scores.items()}
        advanced = [distances[str(e)] for e in range(len(experts))]
        return {"losses": losses, "distance": distances["all"], "advanced": advanced}

    def _mixer(self) -> Mixer:
        return Mixer(
            self.partition,
            self.study.evaluation,
            build(self.config["data"], Data),
            self.study.folder / "scores.json",
            str(self.config["trainer"]["precision"]),
        )


def _validated(job: Job, expert: int) -> float:
    """The loss of an expert in its interval at the end of its last round."""
    key = f"val/mse/{expert}"
    losses = {
        line["step"]: line[key]
        for line in read_metrics(job.folder / "metrics.jsonl")
        if key in line
    }
    if job.steps not in losses:
        raise ValueError(
            f"{job.folder} was not validated at step {job.steps}, by which an adaptive budget "
            "decides: keep the LossByInterval callback, JsonLines logger and limit_val_batches"
        )
    return losses[job.steps]


def _fit_job(
    study: Study, config: dict[str, Any], name: str, steps: int, expert: int | None = None
) -> Job:
    config = copy.deepcopy(config)
    arguments = config["model"]["init_args"]
    if expert is not None:
        arguments["expert"] = expert
    elif "expert" in arguments:  # the baseline of experts: the same network for the whole chain
        config["model"]["class_path"] = "expertdiff.methods.single.Diffusion"
        del arguments["expert"]
    config["trainer"]["enable_progress_bar"] = False  # the log is a file
    return Job(name, "fit", config, study.folder / name, steps)


def _test_job(study: Study, config: dict[str, Any], name: str, bundle: Bundle) -> Job:
    config = copy.deepcopy(config)
    output = study.folder / "tests" / name
    evaluation = config["study"]["evaluation"]
    config["model"] = {
        "class_path": "expertdiff.methods.stitched.Stitched",
        "init_args": {"bundle": str(bundle.folder), "evaluation": evaluation, "output": None},
    }
    # To test the bundle again by hand; that result lies with the bundle, not in the study.
    write_text(bundle.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    config["model"]["init_args"]["output"] = str(output)
    config["trainer"]["enable_progress_bar"] = False
    batches = -(-evaluation["samples"] // evaluation["batch_size"]) * len(evaluation["seeds"])
    return Job(f"test {name}", "test", config, output, batches)


def finished(job: Job) -> bool:
    """Whether both the record and a whole checkpoint say so."""
    if not (job.folder / "done.json").is_file():
        return False
    newest = checkpoints.newest(job.folder / "checkpoints")
    return newest is not None and checkpoints.step_of(newest) >= job.steps


def _tested(job: Job) -> bool:
    path = job.folder / "metrics.json"
    if not path.is_file():
        return False
    result, arguments = read_json(path), job.config["model"]["init_args"]
    manifest = Path(arguments["bundle"]) / "manifest.json"
    judge = build(arguments["evaluation"]["judge"], Judge)
    return (
        result["manifest_sha256"] == sha256_of(manifest)
        and (job.folder / "job.yaml").is_file()
        and yaml.safe_load((job.folder / "job.yaml").read_text())["model"] == job.config["model"]
        and judge.own_reference in ("", result["reference"])  # the file may be another by now
    )


def _record(
    study: Study,
    config: dict[str, Any],
    data: dict[str, Any],
    partition: Partition,
    jobs: list[Job],
) -> dict[str, Any]:
    """The content of study.json; refuses a folder of another study's settings, budgets or data."""
    path = study.folder / "study.json"
    ours = {key: config[key] for key in ("model", "ema", "seed_everything")}
    for key in ("precision", "accumulate_grad_batches", "gradient_clip_val"):
        ours[key] = config["trainer"][key]
    ours |= {"batch_size": config["data"]["init_args"]["batch_size"], "data": data}
    ours["steps"] = {job.name: job.steps for job in jobs}
    if isinstance(study.budget, Budget):
        ours["budget"] = describe(study.budget)
    if path.is_file():
        theirs = read_json(path)["settings"]
        # A baseline may be added or left out later.
        for steps, others in ((ours["steps"], theirs["steps"]), (theirs["steps"], ours["steps"])):
            if "baseline" in steps:
                others.setdefault("baseline", steps["baseline"])
        if changed := differences(ours, theirs):
            raise ValueError(
                f"{study.folder} holds another study ({'; '.join(changed)}): "
                "choose another --study.name, or restore the settings"
            )
    intervals = {f"expert-{i}": [e.lo, e.hi] for i, e in enumerate(partition.intervals())}
    return {
        "name": study.name,
        "settings": ours,
        "evaluation": config["study"]["evaluation"],
        "every_n_steps": config["checkpoint"]["every_n_steps"],
        "partition": list(partition.edges),
        "process": config["model"]["init_args"]["process"],
        "data": config["data"],
        "iterations": study.iterations,
        "seed": config["seed_everything"],
        "jobs": {
            job.name: {
                "interval": intervals.get(job.name, [0, 1]),
                "iterations": job.steps,
            }
            for job in jobs
        },
    }


def run(jobs: list[Job], parallel: int | None = None) -> None:
    """Runs jobs as processes, several at a time, with their progress in one terminal.

    A job that fails leaves the others running. SIGTERM, a closed terminal or Ctrl-C stop all jobs,
    each with a checkpoint.

    Raises:
        ValueError: `parallel` is below 1.
        SystemExit: after all have ended, if any failed or was interrupted.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel {parallel} runs nothing: give 1 or more jobs at a time")
    if not jobs:
        return
    slots = _slots(len(jobs), parallel)
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
        codes = [abs(job.process.returncode) for job in failed]
        raise SystemExit(max((c for c in codes if c != INTERRUPTED), default=INTERRUPTED))


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _slots(jobs: int, parallel: int | None) -> list[dict[str, str]]:
    """The environment of each place where a job can run."""
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        # More jobs than GPUs share them in turn.
        return [{"CUDA_VISIBLE_DEVICES": visible[i % gpus]} for i in range(parallel or gpus)]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    at_once = min(jobs, parallel or cores)
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
        step, word = job.progress()
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
