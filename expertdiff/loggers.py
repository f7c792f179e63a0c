"""Where numbers and pictures go: JSON lines beside the run, W&B, TensorBoard, CSV."""

import json
import netrc
import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from PIL import Image

from expertdiff.files import write_text, writing
from expertdiff.metrics import read_metrics

QUIET = ("offline", "dryrun", "disabled")
"""Modes in which W&B asks for no account."""

PATIENCE = 10
"""Seconds that W&B's service has for its answer before a run is kept offline."""


class StudyLogger(ABC):
    """A logger that is told its study and job once they are known."""

    @abstractmethod
    def attach(self, folder: Path, study: str, job: str) -> None:
        """Log into `folder`, as `job` of `study`."""


class JsonLines(Logger, StudyLogger):
    """Appends ``{"step": .., ..}`` to ``<save_dir>/metrics.jsonl``.

    A resumed run keeps the lines up to its checkpoint, so that every step stands there once.
    (Lightning's CSVLogger deletes the file of the earlier start.)

    Args:
        save_dir: the run's folder; set by `attach`.
    """

    def __init__(self, save_dir: str | Path = ".") -> None:
        super().__init__()
        self._save_dir = Path(save_dir)

    def attach(self, folder: Path, study: str, job: str) -> None:
        self._save_dir = folder

    @property
    def path(self) -> Path:
        """The file."""
        return self._save_dir / "metrics.jsonl"

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration lies beside the file."""

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drops the lines after `step`: a run that starts again from there writes them anew."""
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class WandB(WandbLogger, StudyLogger):
    """Weights & Biases that never prompts, and goes offline where it cannot start online.

    Online only with an account (``WANDB_API_KEY`` or a `wandb login`) and a network; otherwise the
    run is kept offline in the run's folder, and `wandb sync` uploads it later. ``WANDB_MODE`` is
    obeyed. Where W&B can write nothing at all, or no longer, training goes on without it.

    Args:
        project: the W&B project.
        offline: even with an account.
        tags: of every run.
    """

    def __init__(
        self, project: str = "expertdiff", offline: bool = False, tags: list[str] | None = None
    ) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode not in QUIET and (offline or not _has_account()):
            mode = "offline"
        super().__init__(
            project=project,
            mode=mode,  # Lightning's `offline` would set WANDB_MODE for the whole process
            tags=tags,
            settings=wandb.Settings(init_timeout=PATIENCE, silent=True, console="off"),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning sets it, W&B warns of it
        self._lost = False

    @rank_zero_only
    def attach(self, folder: Path, study: str, job: str) -> None:
        # The id is kept, so that a dashboard shows one run a job over restarts; and it is drawn,
        # so that studies of one name on two machines stay apart.
        kept = folder / "wandb_id"
        if not kept.is_file():
            write_text(kept, secrets.token_hex(4))
        name = f"{study}-{job}"
        run = {"dir": str(folder), "id": f"{name}-{kept.read_text()}", "name": name}
        self._wandb_init |= run | {"group": study, "job_type": job}
        self._save_dir, self._name, self._id = run["dir"], run["name"], run["id"]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run."""
        if self._experiment is None:
            self._start()
        return super().experiment

    def _start(self) -> None:
        """Starts the run: offline, or a mute one, where no better can be had."""
        import wandb

        try:
            folder = Path(self._save_dir) / "wandb"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # W&B would write elsewhere, and not say so
                pass
        except OSError as error:
            rank_zero_warn(f"training goes on without W&B, which cannot write: {error}")
            self._wandb_init["mode"] = "disabled"
        for worse in ("offline", "disabled"):
            try:
                run = super().experiment
                break
            except Exception as error:  # whatever the service says, training goes on
                wandb.teardown()  # or the service would call the run's id in use
                rank_zero_warn(f"W&B is {worse} for this run: {' '.join(str(error).split())}")
                self._wandb_init["mode"] = worse
        else:
            run = super().experiment
        run.define_metric("seconds", hidden=True)  # an axis to choose, no curve to look at

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(super().log_hyperparams, *args, **kwargs)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(super().log_metrics, *args, **kwargs)

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(super().log_image, *args, **kwargs)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(super().log_table, *args, **kwargs)

    def finish(self) -> None:
        """Ends the run: what comes next is another."""
        self._unless_lost(lambda: self.experiment.finish())

    def _unless_lost(self, log: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._lost:
            return
        try:
            log(*args, **kwargs)
        except Exception as error:  # its service may have been killed, or the disk be full
            self._lost = True
            rank_zero_warn(f"training goes on without W&B: {' '.join(str(error).split())}")


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


class TensorBoard(TensorBoardLogger, StudyLogger):
    """TensorBoard's event files in ``<run>/tensorboard``; every start of a run adds one.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            super().__init__(".", name="", version="tensorboard", default_hp_metric=False)
        except ModuleNotFoundError:
            raise ValueError(
                "TensorBoard is not installed: pip install tensorboard, or choose the logger CSV"
            ) from None

    def attach(self, folder: Path, study: str, job: str) -> None:
        self._root_dir = str(folder)


class CSV(CSVLogger, StudyLogger):
    """``<run>/csv/version_<n>/metrics.csv``: of every start its own, so that none is deleted."""

    def __init__(self) -> None:
        super().__init__(".", name="csv", flush_logs_every_n_steps=1)

    def attach(self, folder: Path, study: str, job: str) -> None:
        self._root_dir = self._save_dir = str(folder)


def log_picture(loggers: Sequence[Logger], key: str, path: Path, step: int | None = None) -> None:
    """Shows a PNG as ``pictures/<key>`` in the loggers that show pictures."""
    key = f"pictures/{key}"
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")
