"""Where numbers go: one JSON line a step beside the run, and Weights & Biases."""

import json
import netrc
import os
import secrets
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from expertdiff.files import write_text, writing


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


def read_metrics(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file; one torn by a kill is left out.

    Args:
        path: the file; none has no lines.
        last: read about this many bytes from the end only.
    """
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        cut = last is not None and path.stat().st_size > last
        if cut:
            file.seek(-last, os.SEEK_END)
        texts = file.read().splitlines()[cut:]
    lines = []
    for text in texts:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class WandB(WandbLogger, StudyLogger):
    """Weights & Biases that never prompts, and goes offline where it cannot start online.

    Online only with an account (``WANDB_API_KEY`` or a `wandb login`) and a network; otherwise the
    run is kept offline in the run's folder, and `wandb sync` uploads it later.

    Args:
        project: the W&B project.
        mode: ``auto`` is online with an account, else offline.
        tags: of every run.
    """

    def __init__(
        self,
        project: str = "expertdiff",
        mode: Literal["auto", "online", "offline"] = "auto",
        tags: list[str] | None = None,
    ) -> None:
        import wandb

        if mode == "auto":
            mode = "online" if _has_account() else "offline"
        super().__init__(
            project=project,
            offline=mode == "offline",
            tags=tags,
            settings=wandb.Settings(init_timeout=20, silent=True, console="off"),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning sets it, W&B warns of it

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
    def experiment(self) -> Any:
        try:
            return super().experiment
        except Exception as error:  # whatever the service says, training goes on
            if self._offline:
                raise
            warnings.warn(f"W&B is offline ({error}); `wandb sync` uploads later", stacklevel=2)
            self._offline, self._wandb_init["mode"] = True, "offline"
            return super().experiment


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
