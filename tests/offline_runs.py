"""Reads the runs that W&B keeps offline, which nothing of W&B itself does."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """What one ``offline-run-*`` folder holds.

    Attributes:
        folder: it.
        id, group, job_type, tags: of the run.
        config: as it is at the end.
        history: key to [(``trainer/global_step``, value)], in the order of logging.
        hidden: keys without a panel of their own.
        axes: key or pattern to what its panels are drawn against.
    """

    folder: Path
    id: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    axes: dict[str, str] = field(default_factory=dict)


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs in ``<folder>/wandb``, in the order of their starts."""
    import wandb

    wandb.teardown()  # only now the service has written its files to their end
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*"))]


def _read(folder: Path) -> OfflineRun:
    run = OfflineRun(folder)
    (path,) = folder.glob("run-*.wandb")
    for record in records(path):
        if record.HasField("run"):
            run.id, run.group = record.run.run_id, record.run.run_group
            run.job_type, run.tags = record.run.job_type, list(record.run.tags)
        for update in (*record.run.config.update, *record.config.update):
            run.config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        if record.HasField("history"):
            _add_history(run, record.history.item)
        if record.HasField("metric"):
            name = record.metric.name or record.metric.glob_name
            run.axes[name] = record.metric.step_metric
            if record.metric.options.hidden:
                run.hidden.add(name)
    return run


def _add_history(run: OfflineRun, items: Any) -> None:
    row: dict[str, Any] = {}
    for item in items:
        *outer, key = item.nested_key or [item.key]
        inner = row
        for name in outer:  # a picture or a table is written as the items of a dictionary
            inner = inner.setdefault(name, {})
        inner[key] = json.loads(item.value_json)
    step = row.pop("trainer/global_step", None)
    for key, value in row.items():
        if not key.startswith("_"):  # W&B's own step and clocks
            run.history.setdefault(key, []).append((step, value))


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        part += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(part)
            part = b""
