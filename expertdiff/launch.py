"""Launch a study: every job its own process; then stitch, test and report.

On this machine, or on a SLURM cluster. Safe to run again: finished work is kept, unfinished work
goes on from its checkpoints.
"""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from expertdiff.budgets import Adaptive, Budget, as_budget
from expertdiff.bundle import Bundle
from expertdiff.cluster import Submission, queue
from expertdiff.describe import build, describe, differences
from expertdiff.diffusion.partition import Partition
from expertdiff.evaluation.judge import Judge
from expertdiff.files import read_json, sha256_of, writable, write_json, write_text
from expertdiff.jobs import Job, finished, run, train
from expertdiff.methods.base import Method
from expertdiff.report import write_report
from expertdiff.report.dashboard import dashboard
from expertdiff.report.study import BASELINE, SHARED, read_study
from expertdiff.report.verdict import missing
from expertdiff.rounds import Rounds
from expertdiff.study import Study


@dataclass
class Plan:
    """The training jobs of a study, all accepted, none started.

    Attributes:
        study: names, folders, budgets.
        config: the resolved configuration of ``fit``; plain data.
        first: the job that the experts start from, if there is one.
        parts: the experts, cleanest first.
        whole: networks of the whole chain.
        record: the content of ``study.json``.
        rounds: who trains the experts of an adaptive budget.
    """

    study: Study
    config: dict[str, Any]
    first: list[Job]
    parts: list[Job]
    whole: list[Job]
    record: dict[str, Any]
    rounds: Rounds | None

    @property
    def jobs(self) -> list[Job]:
        """All, in the order of ``jobs.txt``: expert i is the i-th."""
        return self.parts + self.first + self.whole

    def write(self) -> None:
        """Writes down the study, from which it can be launched and submitted."""
        writable(self.study.folder)
        write_json(self.study.folder / "study.json", self.record)
        config = yaml.safe_dump(self.config, sort_keys=False)
        write_text(self.study.folder / "config.yaml", config)
        names = "".join(f"{job.name}\n" for job in self.jobs)
        write_text(self.study.folder / "jobs.txt", names)

    def reported(self) -> bool:
        """Whether there is a report of all that this study asks for."""
        folder = self.study.folder
        return (
            (folder / "report.html").is_file()
            and read_json(folder / "study.json") == self.record
            and not missing(read_study(folder))
        )


def plan(
    study: Study,
    config: dict[str, Any],
    data: dict[str, Any],
    job: str,
    parallel: int | None = None,
) -> Plan:
    """The jobs of a study; nothing is written yet.

    Args:
        study: names, folders, budgets.
        config: the resolved configuration of ``fit``; plain data.
        data: what the training data are (`Data.identity`).
        job: the name of the only job, where the method trains the whole chain in one.
        parallel: jobs at a time, for the rounds of an adaptive budget.

    Raises:
        ValueError: the folder holds another study, nothing says how the models are to be judged,
            or several seeds are to be trained in one job.
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
    if study.shared:
        _check_shared(study, config, experts)
    first, parts, whole = [], [], []
    if experts:
        if study.shared:
            first.append(_fit_job(study, config, SHARED, study.shared, "Shared"))
        for i, steps in enumerate(study.budgets(partition)):
            parts.append(_fit_job(study, config, f"expert-{i}", steps, expert=i))
        if study.baseline:
            whole.append(_fit_job(study, config, BASELINE, study.iterations))
    else:
        whole.append(_fit_job(study, config, job, study.iterations))
    record = _record(study, config, data, partition, first + parts + whole)
    rounds = None
    if experts and isinstance(budget, Adaptive):
        rounds = Rounds(study, config, record["settings"], budget, partition, parallel)
    return Plan(study, config, first, parts, whole, record, rounds)


def launch(plan: Plan, parallel: int | None = None) -> Path:
    """Trains every job of a study that is not finished, then stitches, tests and reports.

    Args:
        plan: the study.
        parallel: jobs at a time; by default one a GPU, or one a CPU core.

    Returns:
        The path of the report.

    Raises:
        SystemExit: a job failed or was interrupted; the code is that of the job.
    """
    study, config = plan.study, plan.config
    plan.write()
    train(plan.first, parallel)  # the experts wait for it
    if plan.rounds:
        plan.rounds.train(plan.parts)
        train(plan.whole, parallel)  # after the rounds, none of which has to wait for it
    else:
        train(plan.parts + plan.whole, parallel)

    trained = {"stitched": plan.parts} | {job.name: [job] for job in plan.whole}
    tests = []
    for name, sources in trained.items():
        if sources:
            folder = study.folder / "bundles" / name
            bundle = Bundle.stitch([job.folder for job in sources], folder)
            tests.append(_test_job(study, config, name, bundle))
    # On a CPU one after another where the first leaves the reference's statistics to the next.
    alone = study.evaluation.judge.keeps and not torch.cuda.is_available()
    at_once = 1 if alone else parallel
    untested = [job for job in tests if not _tested(job)]
    for job in untested:  # an old result must not stand beside a new configuration
        (job.folder / "metrics.json").unlink(missing_ok=True)
    run(untested, at_once)
    report = write_report(study.folder)
    dashboard(study.folder, config["trainer"]["logger"])
    print(f"report: {report}")
    return report


def submit(plan: Plan, site: Path, parallel: int | None = None, dry_run: bool = False) -> None:
    """Sends every job of a study that is not finished to a SLURM cluster; prints their ids.

    Args:
        plan: the study.
        site: the file of the cluster's settings.
        parallel: training jobs at a time; by default as many as the cluster has room for.
        dry_run: print the commands instead, and write nothing.

    Raises:
        ValueError: jobs of the study are in the queue, the experts' budget is decided in rounds,
            or SLURM refuses.
    """
    folder = plan.study.folder
    if plan.rounds:
        raise ValueError(
            "an Adaptive budget is decided in rounds, which no queue waits for: launch the study "
            "without --slurm inside one job, or give study.budget in numbers"
        )
    submission = Submission(folder, site, dry_run)
    if waiting := queue(folder):
        ids = " ".join(job.id for job in waiting)
        raise ValueError(
            f"{folder} has {len(waiting)} jobs in the queue: wait for them (expertdiff status "
            f"{folder}), or cancel them with `scancel {ids}`"
        )
    unfinished = [job for job in plan.jobs if not finished(job)]
    if not unfinished and plan.reported():
        print(f"finished before: {folder / 'report.html'}")
        return
    if not dry_run:
        plan.write()
        for job in unfinished:
            job.write()
    places = {job.name: k for k, job in enumerate(plan.jobs)}

    def train(group: list[Job], after: list[str]) -> list[str]:
        if not group:
            return []
        id = submission.train([places[job.name] for job in group], parallel, after)
        if not dry_run:
            print(f"submitted {id}: {', '.join(job.name for job in group)}")
        return [id]

    # An expert waits for the job that it starts from; all others for nothing.
    first, parts, whole = (
        [job for job in unfinished if job in group]
        for group in (plan.first, plan.parts, plan.whole)
    )
    start = train(first, [])
    if first and not parallel:
        ids = start + train(whole, []) + train(parts, start)
    else:  # `parallel` holds within one array
        ids = start + train(parts + whole, start)
    evaluation = submission.evaluate(ids)
    if not dry_run:
        print(f"submitted {evaluation}: evaluation\nhow it goes: expertdiff status {folder}")


def _check_shared(study: Study, config: dict[str, Any], experts: bool) -> None:
    """Raises a ValueError where experts would not start from what they are to share."""
    if not experts:
        raise ValueError(
            f"study.shared {study.shared} is for experts that are trained apart, as those of MDM: "
            "set it to 0"
        )
    ema = config["ema"]
    left = ema["decay"] ** study.shared
    if left > 0.05 and not ema["warmup"] and ema["power"] is None:
        raise ValueError(
            f"after study.shared {study.shared} steps the averaged weights, which experts start "
            f"from, are still {100 * left:.0f} % random at ema.decay {ema['decay']}: set "
            "ema.warmup to true, or share more steps"
        )


def _fit_job(
    study: Study,
    config: dict[str, Any],
    name: str,
    steps: int,
    whole: str = "Diffusion",
    expert: int | None = None,
) -> Job:
    config = copy.deepcopy(config)
    arguments = config["model"]["init_args"]
    if expert is not None:
        arguments["expert"] = expert
        if study.shared:
            arguments["init_from"] = str(study.folder / SHARED)
    elif "expert" in arguments:  # beside experts: the same network for the whole chain
        config["model"]["class_path"] = f"expertdiff.methods.single.{whole}"
        known = inspect.signature(Method.__init__).parameters
        config["model"]["init_args"] = {k: v for k, v in arguments.items() if k in known}
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
