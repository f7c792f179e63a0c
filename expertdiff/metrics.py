"""What a job has written down of its training so far; read without torch or Lightning."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


@dataclass(frozen=True)
class Progress:
    """Where a job is.

    Attributes:
        step: the last one that was logged.
        loss, speed: the last training loss, and steps a second; ``None`` where none was logged.
    """

    step: int
    loss: float | None
    speed: float | None

    @classmethod
    def of(cls, folder: Path) -> "Progress":
        """That of the job in `folder`."""
        lines = read_metrics(folder / "metrics.jsonl", last=8192)
        loss, speed = (
            next((line[key] for line in reversed(lines) if key in line), None)
            for key in ("train/loss", "steps_per_second")
        )
        return cls(max((line["step"] for line in lines), default=0), loss, speed)

    @property
    def words(self) -> str:
        """Loss and speed, as far as they are known."""
        loss = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        return ", ".join(loss + ([] if self.speed is None else [f"{self.speed:.1f} it/s"]))
