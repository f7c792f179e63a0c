"""Latents on disk: one ``.npy`` an array, filled block by block by any number of processes.

``<split>.npy``         the moments [N, 2, 2, C, h, w] of each picture and of its mirror image: mean
                        and standard deviation, float16 or float32
``<split>-labels.npy``  [N], int64
``<split>-images.npy``  the first pictures themselves, for judging samples: [n, 3, H, W], uint8
``plan.json``           what is being made
``blocks/``             which rows are finished, with their SHA-256
``store.json``          what was made; written last
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from expertdiff.data.base import Split
from expertdiff.describe import differences
from expertdiff.files import read_json, replacing, write_json

PAGE = 4096
"""Bytes before the first value of a file, so that blocks are whole pages: where several machines
write to one file, a page must have one writer."""


class Block(NamedTuple):
    """Rows [start, stop) of a split."""

    split: Split
    start: int
    stop: int


class Store:
    """The arrays of a folder.

    Args:
        folder: where they lie.
        facts: plain data: ``autoencoder`` (its description), ``scale`` (its factor, shift and
            SHA-256), ``shape`` of the latents, ``dtype``, ``image_size``, ``num_classes``,
            ``class_names``, the rows of a ``block``, how many pictures are ``kept``, and of each of
            ``splits`` its number ``n`` and the SHA-256 of its ``labels`` and ``pictures``; of a
            finished store also the SHA-256 of all ``blocks``, and its ``digest``.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    @classmethod
    def planned(cls, folder: Path, facts: dict[str, Any], labels: dict[str, np.ndarray]) -> "Store":
        """A store to be filled, or to go on with; any number of processes may ask for it at once.

        Raises:
            ValueError: the folder holds another store, or something else.
        """
        plan = folder / "plan.json"
        # In this order: another process writes its plan first.
        if any(folder.glob("[!.]*")) and not plan.is_file():
            raise ValueError(f"{folder} holds something else than latents: choose another folder")
        if not plan.is_file():
            write_json(plan, facts)
        # As plain data, where a tuple is a list.
        if changed := differences(read_json(plan), json.loads(json.dumps(facts))):
            raise ValueError(
                f"{folder} holds other latents ({'; '.join(changed)}): choose another folder"
            )
        store = cls(folder, facts)
        for name in get_args(Split):
            for array in (name, f"{name}-images"):
                store._reserve(array)
            with replacing(store._path(f"{name}-labels")) as temporary:
                with open(temporary, "wb") as file:
                    np.save(file, labels[name])
        return store

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """The finished store of a folder.

        Raises:
            ValueError: there is none, it is not finished, or does not say its scale.
        """
        path = folder / "store.json"
        if not path.is_file():
            begun = (folder / "plan.json").is_file()
            raise ValueError(
                f"{folder} is not finished: run the `expertdiff latents` that began it again"
                if begun
                else f"{folder} holds no latents: make them with `expertdiff latents`"
            )
        facts = read_json(path)
        if not isinstance(facts, dict) or facts.get("format") != 1:
            raise ValueError(f"{path} is of another format: encode the images again")
        scale = facts.get("scale")
        if not isinstance(scale, dict) or not {"factor", "shift", "autoencoder"} <= scale.keys():
            raise ValueError(
                f"{path} does not say the scale of its latents ({scale}), without which they mean "
                "nothing: encode the images again"
            )
        return cls(folder, facts)

    def blocks(self, name: Split) -> list[Block]:
        """Those of a split."""
        n, size = self.facts["splits"][name]["n"], self.facts["block"]
        return [Block(name, start, min(n, start + size)) for start in range(0, n, size)]

    def share(self, rank: int, world_size: int) -> list[Block]:
        """The blocks that one of several processes is still to write."""
        every = [block for name in get_args(Split) for block in self.blocks(name)]
        return [block for block in every[rank::world_size] if not self._record(block).is_file()]

    def kept(self, block: Block) -> int:
        """How many images of a block are kept, from its first on."""
        return min(max(self.facts["kept"] - block.start, 0), block.stop - block.start)

    def write(self, block: Block, moments: np.ndarray, images: np.ndarray) -> None:
        """The rows of a block: moments [n, 2, 2, C, h, w] and images uint8 [kept, 3, H, W].

        Raises:
            ValueError: there is no room.
        """
        arrays = {block.split: moments, f"{block.split}-images": images}
        digests = {}
        for name, rows in arrays.items():
            rows = np.ascontiguousarray(rows, self._layout(name)[0])
            try:
                with open(self._path(name), "r+b") as file:
                    file.seek(PAGE + block.start * rows[:1].nbytes)
                    file.write(rows.data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ValueError(
                    f"cannot write {self._path(name)} ({error.strerror}): make sure of "
                    f"{self.nbytes('', 'images') / 2**30:.1f} GiB of room there, and run the same "
                    "again"
                ) from error
            digests[name] = sha256(rows)
        write_json(self._record(block), digests)

    def finish(self) -> bool:
        """Writes ``store.json`` if all blocks are there; whether they are."""
        if self.share(0, 1):
            return False
        digests = {
            name: [read_json(self._record(block)) for block in self.blocks(name)]
            for name in get_args(Split)
        }
        # Not of the description, which has a path.
        content = [{k: v for k, v in self.facts.items() if k != "autoencoder"}, digests]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        write_json(self.folder / "store.json", self.facts | {"blocks": digests, "digest": digest})
        return True

    def moments(self, name: Split, verified: bool) -> np.ndarray:
        """[N, 2, 2, C, h, w], mapped into memory; `verified` byte by byte, or by its size alone.

        Raises:
            ValueError: missing or damaged.
        """
        moments = self._mapped(name)
        if verified:
            self._verify(name, moments)
        return moments

    def images(self, name: Split) -> np.ndarray:
        """The first pictures, uint8 [n, 3, H, W], mapped into memory; see `moments`."""
        images = self._mapped(f"{name}-images")
        self._verify(f"{name}-images", images)
        return images

    def labels(self, name: Split) -> np.ndarray:
        """[N], int64; see `moments`."""
        labels = self._mapped(f"{name}-labels")
        if sha256(labels) != self.facts["splits"][name]["labels"]:
            raise ValueError(f"{self._path(f'{name}-labels')} is damaged: encode the images again")
        return labels

    def nbytes(self, *what: str) -> int:
        """Of all moments (""), of all ``images``, or of both."""
        layouts = (self._layout(f"{name}-{part}") for name in get_args(Split) for part in what)
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layouts)

    def _layout(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Type and shape of an array."""
        split, _, what = name.partition("-")
        n, size = self.facts["splits"][split]["n"], self.facts["image_size"]
        return {
            "": (np.dtype(self.facts["dtype"]), (n, 2, 2, *self.facts["shape"])),
            "images": (np.dtype(np.uint8), (min(n, self.facts["kept"]), 3, size, size)),
            "labels": (np.dtype(np.int64), (n,)),
        }[what]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _record(self, block: Block) -> Path:
        return self.folder / "blocks" / f"{block.split}-{block.start:08d}.json"

    def _reserve(self, name: str) -> None:
        """The file of an array in its full size; what is in it stays."""
        dtype, shape = self._layout(name)
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        text = str(header).ljust(PAGE - 11) + "\n"
        start = np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text.encode("ascii")
        # Not truncated by opening it: another process may have begun to fill it.
        descriptor = os.open(self._path(name), os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b") as file:
            file.write(start)
            file.truncate(PAGE + dtype.itemsize * math.prod(shape))

    def _mapped(self, name: str) -> np.ndarray:
        path, (dtype, shape) = self._path(name), self._layout(name)
        try:
            # Copy on write, because torch wants memory that could be written to.
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot read {path} ({error}): encode the images again") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{path} holds {array.dtype} {list(array.shape)} instead of {dtype} {list(shape)}: "
                "encode the images again"
            )
        return array

    def _verify(self, name: str, array: np.ndarray) -> None:
        split = name.partition("-")[0]
        for block, digests in zip(self.blocks(split), self.facts["blocks"][split]):
            if sha256(array[block.start : block.stop]) != digests[name]:
                raise ValueError(
                    f"{self._path(name)} is damaged from row {block.start} on: remove "
                    f"{self.folder / 'store.json'} and {self._record(block)}, and run the "
                    "`expertdiff latents` that made them again"
                )


def sha256(rows: np.ndarray) -> str:
    """Of the bytes of an array, in hex."""
    return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()
