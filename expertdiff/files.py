"""Files that are whole or not there: written beside their target, synced, then renamed."""

import fcntl
import hashlib
import json
import os
import secrets
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class Unusable(OSError):
    """A folder that cannot be written, or that another job is writing."""


class WriteFailed(OSError):
    """A file that could not be written; an older one in its place is as it was."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(getattr(error, "errno", None), getattr(error, "strerror", None))
        self.path, self.reason = path, self.strerror or error

    def __str__(self) -> str:
        return (
            f"cannot write {self.path} ({self.reason}): make room or choose another folder; older "
            "files are untouched, and the same command goes on from them"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the system refuses becomes a `WriteFailed` that names `path`."""
    try:
        yield
    except WriteFailed:
        raise
    except OSError as error:
        raise WriteFailed(path, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes its place when the block ends without an error.

    Whatever happens in between (a full disk, a kill), the old file stays as it was.

    Raises:
        WriteFailed: the system refused.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable(folder: Path) -> None:
    """Makes `folder` and tries to write into it, before hours of work that end there.

    Raises:
        Unusable: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"expertdiff")
            file.flush()
    except OSError as error:
        raise Unusable(
            f"{folder} cannot be written ({error.strerror}): make room, or choose another folder"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process: two jobs must never write one run.

    The system lets go when the process ends, however it ends, so nothing stale is left to judge;
    ``lock`` tells who holds it. Only where a file server has not yet noticed the end of another
    node may a task that SLURM queued again take over from its own earlier run.

    Raises:
        Unusable: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / "lock"):
        yield


def _held(path: Path) -> TextIO:
    us = {"host": socket.gethostname(), "pid": os.getpid(), "task": slurm_task()}
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        if us["task"] and holder["task"] == us["task"] and holder["host"] != us["host"]:
            path.unlink()  # a new file, which nobody holds
            return _held(path)
        task = f", SLURM task {holder['task']}" if holder["task"] else ""
        raise Unusable(
            f"{path.parent} is in use by another job (host {holder['host']}, process "
            f"{holder['pid']}{task}): wait for it, or give the study another name"
        ) from None
    except OSError as error:
        warnings.warn(
            f"the file system of {path.parent} has no locks ({error.strerror}): make sure that no "
            "other job writes there",
            stacklevel=4,
        )
    file.truncate(0)
    json.dump(us, file)
    file.flush()
    return file


def _holder(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # it has not told yet
        return dict.fromkeys(("host", "pid", "task"))


def slurm_task() -> str | None:
    """The SLURM job of this process, an array's task as ``A_k``; it keeps it when requeued."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def write_text(path: Path, text: str) -> None:
    """`text` to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value of `path`; a ValueError that names the file when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore or remove it") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
