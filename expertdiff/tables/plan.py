"""What a table consists of: a preset, read and laid out as cells to train."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from expertdiff.data import densities
from expertdiff.data.base import Split
from expertdiff.data.densities import Density
from expertdiff.describe import VARIADIC, build, describe
from expertdiff.diffusion.process import DiscreteVP
from expertdiff.diffusion.samplers import Sampler

T = TypeVar("T")

PRESETS = Path(__file__).parent

KEYS = {
    "sets": (list, dict),
    "seeds": list,
    "schedules": dict,
    "base": dict,
    "models": dict,
    "pairs": dict,
    "reference": str,
    "sampler": dict,
}
"""What a preset must say, and as what."""

BASE = (
    ("study", "iterations"),
    ("model", "init_args"),
    ("data", "init_args"),
    ("trainer", "precision"),
)
"""What the base of a preset must say."""


@dataclass(frozen=True)
class Cell:
    """One model on one set under one schedule: a training of all seeds side by side.

    Attributes:
        set, schedule, model: names, as the table shows them.
        folder: where it trains and is scored.
        config: of ``expertdiff fit``.
    """

    set: str
    schedule: str
    model: str
    folder: Path
    config: dict[str, Any]


class Plan:
    """The cells of a table, from a preset with some parts replaced.

    A preset is a YAML file: `sets` (by name, or name and ``{class_path, init_args}``), `seeds`,
    `schedules` (noise processes by name), `base` (a configuration of ``fit``), `models` (what each
    lays over the base), `pairs` (a gated model and its single network of equal size), `reference`
    (the split that samples are compared with) and `sampler`. With `like` it says only where it
    differs from another preset; `base` is laid over the other's.

    Args:
        preset: a name, or the path of an own file.
        folder: of the table.
        sets, models, schedules, seeds: what to take of it, or in its place; ``None`` is all.
        steps: of training; ``None`` is the preset's.

    Raises:
        ValueError: no such preset, set, model or schedule, no seed, or a preset with a mistake.
    """

    def __init__(
        self,
        preset: str,
        folder: Path,
        sets: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
        schedules: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
    ) -> None:
        facts = _read(preset)
        self.folder = folder
        self.seeds = list(facts["seeds"] if seeds is None else seeds)
        if not 1 <= len(set(self.seeds)) == len(self.seeds) <= 10:
            raise ValueError(f"seeds {self.seeds} must be different, and one to ten")
        self.sets = _densities(preset, facts["sets"], sets)
        self.processes = {
            name: _built(preset, block, DiscreteVP)
            for name, block in _taken("schedule", facts["schedules"], schedules).items()
        }
        self.models = _taken("model", facts["models"], models)
        self.pairs: dict[str, str] = facts["pairs"]
        self.reference: str = facts["reference"]
        self.sampler = _built(preset, facts["sampler"], Sampler)
        self.base = facts["base"]
        if steps is not None:
            self.base = laid_over(self.base, {"study": {"iterations": steps}})

    @property
    def steps(self) -> int:
        """Of each training."""
        return self.base["study"]["iterations"]

    def groups(self) -> list[list[Cell]]:
        """Every model on every set under every schedule: one list for a set and a schedule."""
        return [
            [self._cell(set_, schedule, model) for model in self.models]
            for set_ in self.sets
            for schedule in self.processes
        ]

    def _cell(self, set_: str, schedule: str, model: str) -> Cell:
        process, folder = self.processes[schedule], self.folder / set_ / schedule / model
        arguments = {"process": describe(process), "seeds": self.seeds}
        # The embedding of t must know how long the chain is.
        arguments["network"] = {"init_args": {"T": process.T}}
        config = laid_over(self.base, self.models[model] or {})
        config = laid_over(config, {"model": {"init_args": arguments}})
        config["data"]["init_args"]["density"] = describe(self.sets[set_])
        config["trainer"]["default_root_dir"] = str(folder)
        return Cell(set_, schedule, model, folder, config)


def density(name: str) -> Density:
    """A set that needs no arguments, by its name in whatever case.

    Raises:
        ValueError: there is none of that name.
    """
    known = {
        key.lower(): cls
        for key, cls in vars(densities).items()
        if isinstance(cls, type) and issubclass(cls, Density) and _needs_nothing(cls)
    }
    if name.lower() not in known:
        raise ValueError(f"{name!r} is no set: choose from {', '.join(sorted(known))}")
    return known[name.lower()]()


def _needs_nothing(cls: type) -> bool:
    # Of a class without a constructor, *args and **kwargs are all there is.
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind not in VARIADIC]
    return not inspect.isabstract(cls) and all(p.default is not p.empty for p in parameters)


def laid_over(under: Any, over: Any) -> Any:
    """`over` where it says something, else `under`; another class drops the old one's arguments."""
    both = isinstance(under, dict) and isinstance(over, dict)
    if not both or over.get("class_path", under.get("class_path")) != under.get("class_path"):
        return copy.deepcopy(over)
    keys = [*under, *(key for key in over if key not in under)]
    return {
        key: laid_over(under[key], over[key])
        if key in under and key in over
        else copy.deepcopy(over.get(key, under.get(key)))
        for key in keys
    }


def _densities(
    preset: str, known: dict[str, Any] | Sequence[str], wanted: Sequence[str] | None
) -> dict[str, Density]:
    """The sets by name; a preset may give its own, as blocks of class and arguments."""
    blocks = known if isinstance(known, dict) else {}
    return {
        name: _built(preset, blocks[name], Density) if name in blocks else density(name)
        for name in wanted or known
    }


def _taken(what: str, known: dict[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"{name!r} is no {what} of the preset: choose from {', '.join(known)}")
    return {name: known[name] for name in wanted or known}


def _built(preset: str, block: Any, base: type[T]) -> T:
    """As `build`, of a block that a user wrote: it may be anything."""
    try:
        return build(block, base)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(_no_preset(preset, f"{block!r}: {error}")) from error


def _read(preset: str) -> dict[str, Any]:
    path = PRESETS / f"{preset}.yaml"
    if not path.is_file():
        path = Path(preset)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise ValueError(
            f"{preset!r} is no preset and no file: choose from {names}, or give a file"
        )
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "like" in facts:
            like = _read(facts.pop("like"))
            facts = like | facts | {"base": laid_over(like["base"], facts.get("base", {}))}
        _check(facts)
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(_no_preset(path, str(error))) from error
    return facts


def _check(facts: dict[str, Any]) -> None:
    """Raises an error unless a preset says all that it must, as it must."""
    if absent := [key for key in KEYS if key not in facts]:
        raise ValueError(f"it has no {', '.join(absent)}")
    for key, kind in KEYS.items():
        if not isinstance(facts[key], kind):
            raise ValueError(f"its {key} cannot be {facts[key]!r}")
    for name, over in facts["models"].items():
        if not isinstance(over or {}, dict):
            raise ValueError(f"its model {name} cannot be {over!r}")
    if facts["reference"] not in get_args(Split):
        raise ValueError(f"its reference {facts['reference']!r} is none of {get_args(Split)}")
    for part, key in BASE:
        facts["base"][part][key]


def _no_preset(preset: str | Path, reason: str) -> str:
    return f"{preset} is not a preset ({' '.join(reason.split())}): see paper.yaml"
