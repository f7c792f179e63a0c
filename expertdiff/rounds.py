"""Experts trained in rounds, after each of which an adaptive budget is decided anew."""

from pathlib import Path
from pkgutil import resolve_name
from statistics import mean
from typing import Any

from expertdiff.analysis.mixes import Mixer
from expertdiff.budgets import Adaptive
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.describe import Described, build
from expertdiff.diffusion.partition import Partition
from expertdiff.files import read_json, write_json
from expertdiff.jobs import Job, train
from expertdiff.metrics import read_metrics
from expertdiff.study import Study


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
        ValueError: a learning rate, timesteps or callbacks that depend on the length of the
            training, check points with a judge whose distance may be below 0, or a ledger of
            another study.
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
        if paced := _paced(config):
            raise ValueError(
                "an adaptive budget cannot have what goes by the length of the run "
                f"({', '.join(paced)}), because that is not known at the start: choose other "
                "timesteps or callbacks"
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
        start = budget.start(partition, study.apart, lasting)
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


def _paced(config: dict[str, Any]) -> list[str]:
    """The timesteps and callbacks of a configuration that go by the length of the run."""
    timesteps = config["model"]["init_args"].get("timesteps")
    callbacks = config["trainer"]["callbacks"]
    parts = callbacks if isinstance(callbacks, list) else [callbacks]
    classes = [resolve_name(part["class_path"]) for part in [timesteps, *parts] if part]
    # Callbacks that are described are, as `Method.run_identity` has it.
    described = [cls for cls in classes if issubclass(cls, Described)]
    return [cls.__name__ for cls in described if getattr(cls, "paced", True)]


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
