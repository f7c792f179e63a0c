"""DualDiff's tables: gated experts on the plane, beside their controls and their floors."""

import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from expertdiff.analysis.gates import gate_figure, gate_record
from expertdiff.bundle import Bundle
from expertdiff.describe import describe, differences
from expertdiff.devices import default_device
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.exact import terminal_mismatch
from expertdiff.experts.gated import GatedExperts
from expertdiff.files import read_json, replacing, write_json
from expertdiff.jobs import Job, finished, run
from expertdiff.methods.base import device_name
from expertdiff.tables import rows as table_rows
from expertdiff.tables.page import write_page
from expertdiff.tables.pictures import animate
from expertdiff.tables.plan import Cell, Plan
from expertdiff.tables.rows import SCORES, Row
from expertdiff.tables.score import POINTS, SAMPLES, Bench, check_fresh


def table(
    name: Literal["dualdiff"],
    preset: str = "paper",
    sets: list[str] | None = None,
    models: list[str] | None = None,
    schedules: list[str] | None = None,
    seeds: list[int] | None = None,
    steps: int | None = None,
    output: Path | None = None,
    parallel: int | None = None,
) -> None:
    """Compute a published table again: train, score, print, CSV, and a page with pictures.

    Run it again to continue: what is trained or scored is kept.

    Args:
        name: which table.
        preset: ``paper``, ``fixed``, ``circle``, ``levers``, or the path of a YAML file like these.
        sets: as ``[dino,moons]``; by default those of the preset, as for what follows.
        models: as ``[baseline,dual]``.
        schedules: as ``[linear]``.
        seeds: of training, as ``[0,1,2]``; all seeds of a cell train side by side as one program.
        steps: of each training.
        output: the table's folder; by default ``runs/<table>-<preset>``.
        parallel: trainings at a time; by default one a GPU, or one a CPU core.
    """
    folder = output or Path("runs") / f"{name}-{Path(preset).stem}"
    plan = Plan(preset, folder, sets, models, schedules, seeds, steps)
    for set_, density in plan.sets.items():  # told now, not after hours of training
        check_fresh(set_, density, plan.reference, len(plan.seeds))
    groups = plan.groups()
    train([cell for group in groups for cell in group], parallel)
    rows: list[Row] = []
    for group in groups:
        rows += Scoring(plan, group).rows()
        table_rows.save(rows, folder)
        title = f"DualDiff, {Path(preset).stem}"
        page = write_page(rows, folder, title, how(plan, groups), plan.pairs)
    print(text(rows))
    print(f"table: {folder / 'table.csv'}\npage: {page}")


def train(cells: Iterable[Cell], parallel: int | None) -> None:
    """Trains every cell that is not finished.

    Raises:
        ValueError: a cell's folder holds another training.
        SystemExit: a training failed or was interrupted.
    """
    jobs = []
    for cell in cells:
        steps = cell.config["study"]["iterations"]
        name = f"{cell.set}/{cell.schedule}/{cell.model}"
        job = Job(name, "fit", cell.config, cell.folder, steps)
        kept = cell.folder / "job.yaml"
        if kept.is_file():
            old = yaml.safe_load(kept.read_text(encoding="utf-8"))
            old["trainer"]["default_root_dir"] = str(cell.folder)  # the table may have moved
            if changed := differences(cell.config, old):
                raise ValueError(
                    f"{cell.folder} holds another training ({'; '.join(changed)}): "
                    "choose another --output, or remove it"
                )
        if not finished(job):
            jobs.append(job)
    run(jobs, parallel)


class Scoring:
    """Scores the models of one set under one schedule, and the floors beside them.

    Args:
        plan: the table.
        cells: those of this set and schedule, all trained.
    """

    def __init__(self, plan: Plan, cells: Sequence[Cell]) -> None:
        self.plan, self.cells = plan, cells
        first = cells[0]
        self.set, self.schedule, self.place = first.set, first.schedule, first.folder.parent
        bf16 = first.config["trainer"]["precision"] == "bf16-mixed"
        density = plan.sets[self.set]
        process = plan.processes[self.schedule]
        self.bench = Bench(density, process, plan.sampler, plan.reference, bf16)
        self.changed = False

    def rows(self) -> list[Row]:
        """Fresh points, the exact denoiser where the density has a width, and every model."""
        floors = [self._row("fresh", self._fresh, {"seeds": self.plan.seeds})]
        if self.bench.exact is not None:
            of = {"process": describe(self.bench.process)}
            floors.append(self._row("exact", self._exact, of))
        trained = {cell.model: self._bundles(cell) for cell in self.cells}
        rows = floors + [self._model(cell, trained[cell.model]) for cell in self.cells]
        self._animate({model: denoisers[0] for model, denoisers in trained.items()})
        return rows

    def _row(
        self,
        model: str,
        compute: Callable[[int, Path], dict[str, float]],
        of: dict[str, Any],
        parameters: int | None = None,
        seconds: float | None = None,
    ) -> Row:
        """A row whose scores are kept in each seed's folder, and computed unless they are there.

        Args:
            model: its name.
            compute: the scores of a seed, which may leave files in the folder it is given.
            of: what they depend on, beside the table itself.
            parameters, seconds: see `Row`.
        """
        folder, parts = self.place / model, []
        of = of | {"reference": self.plan.reference, "sampler": describe(self.plan.sampler)}
        for seed in self.plan.seeds:
            path = folder / f"seed-{seed}" / "scores.json"
            kept = read_json(path) if path.is_file() else {"of": None}
            if kept["of"] != of:
                self.changed = True
                print(f"scoring {self.set}/{self.schedule}/{model}, seed {seed}", flush=True)
                kept = {"of": of, "scores": compute(seed, path.parent)}
                write_json(path, kept)
            parts.append(kept["scores"])
        scores = {key: [part[key] for part in parts] for key in SCORES if key in parts[0]}
        names = (self.set, self.schedule, model)
        return Row(*names, parameters, seconds, self.plan.seeds, str(folder), scores)

    def _fresh(self, seed: int, folder: Path) -> dict[str, float]:
        return self.bench.fresh(self.plan.seeds.index(seed), folder)

    def _exact(self, seed: int, folder: Path) -> dict[str, float]:
        return self.bench.drawn(self.bench.exact, seed, folder) | {"loss": self.bench.least}

    def _bundles(self, cell: Cell) -> list[Denoiser]:
        """The denoisers of a cell, one a seed, each kept as a bundle of its own."""
        folders = [cell.folder / f"seed-{seed}" / "bundle" for seed in self.plan.seeds]
        return [
            Bundle.stitch([cell.folder], folder, seed=seed).denoiser
            for seed, folder in zip(self.plan.seeds, folders)
        ]

    def _model(self, cell: Cell, denoisers: list[Denoiser]) -> Row:
        def compute(seed: int, folder: Path) -> dict[str, float]:
            denoiser = denoisers[self.plan.seeds.index(seed)]
            show_gates(denoiser, self.bench.held_out[:2000], folder)
            return self.bench.model(denoiser, seed, folder)

        done = read_json(cell.folder / "done.json")
        parameters = sum(p.numel() for p in denoisers[0].parameters())
        seconds = done["seconds"] / len(self.plan.seeds)
        return self._row(cell.model, compute, {"weights": done["sha256"]}, parameters, seconds)

    def _animate(self, denoisers: dict[str, Denoiser]) -> None:
        path = self.plan.folder / f"{self.set}-{self.schedule}.gif"
        if self.changed or not path.is_file():
            exact = {} if self.bench.exact is None else {"exact": self.bench.exact}
            shown = {name: denoiser.cpu() for name, denoiser in (exact | denoisers).items()}
            animate(shown, self.plan.sampler, path)


def show_gates(denoiser: Denoiser, points: Tensor, folder: Path) -> None:
    """``gates.png`` and ``gates.json`` of a model that has a gate."""
    network = denoiser.network
    if isinstance(network, GatedExperts):
        write_json(folder / "gates.json", gate_record(network, denoiser.process, points))
        figure = gate_figure(network, denoiser.process, points)
        with replacing(folder / "gates.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100)


def how(plan: Plan, groups: list[list[Cell]]) -> list[str]:
    """How the numbers of a table were made, line by line."""
    lines = [
        f"command: {shlex.join(['expertdiff', *sys.argv[1:]])}",
        f"{plan.steps:,} steps (unless a model has its own), seeds "
        f"{', '.join(map(str, plan.seeds))} trained side by side as one program; training seconds "
        "are its wall clock over the number of seeds",
        f"{SAMPLES:,} samples a seed against {POINTS:,} points of the {plan.reference} split, "
        "averaged weights; ± is the standard deviation over training seeds (sampling seeds, "
        "for floors)",
        "KL: k-NN estimate in bits, k = 5, Chebyshev distance; evaluation loss: held-out points, "
        "the same t and noise for every model",
    ]
    for group in groups:
        name, schedule = group[0].set, group[0].schedule
        x0 = torch.from_numpy(plan.sets[name].points("train", POINTS))
        bits = terminal_mismatch(plan.processes[schedule], x0)
        lines.append(
            f"{name}, {schedule}: the chain ends {bits:.3g} bits from the normal distribution "
            "that sampling starts from"
        )
    records = [read_json(cell.folder / "done.json") for group in groups for cell in group]
    devices = sorted({record["device"] for record in records})
    here = device_name(default_device())
    lines.append(
        f"trained on {', '.join(devices)}; page written on {here}, {platform.machine()}, "
        f"torch {torch.__version__}"
    )
    return lines


def text(rows: list[Row]) -> str:
    """The table for a terminal."""
    heads = [
        "set",
        "schedule",
        "model",
        "parameters",
        "train s",
        "loss",
        "draw s",
        "KL",
        "reverse KL",
    ]
    lines = [heads]
    for row in rows:
        lines.append(
            [
                row.set,
                row.schedule,
                row.model,
                f"{row.parameters:,}" if row.parameters else "-",
                f"{row.seconds:.0f}" if row.seconds else "-",
                row.text("loss", 4),
                row.text("sampling", 1),
                row.text("KL"),
                row.text("reverse KL"),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in lines)
