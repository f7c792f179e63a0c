"""Objects that remember how they were built, to be written down, compared and built again.

A bundle, a checkpoint's identity and a report all need "which network, which process, with which
arguments". Reading that from the object itself serves the command line and Python users alike.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Described:
    """Base of everything that is named in a bundle: keeps its constructor's arguments."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Described":
        self = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        # Partial: copying and abstract-class errors construct without arguments.
        bound = signature.bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        # Without `self`, and without the *args and **kwargs of nn.Module's own constructor.
        named = [p.name for p in signature.parameters.values() if p.kind not in VARIADIC][1:]
        arguments = {name: bound.arguments[name] for name in named if name in bound.arguments}
        # Past nn.Module.__setattr__, which refuses anything before nn.Module.__init__ has run.
        object.__setattr__(self, "_arguments", arguments)
        return self


def describe(value: Any) -> Any:
    """Plain data (JSON, YAML) for `value`: a `Described` becomes ``{class_path, init_args}``."""
    if isinstance(value, Described):
        cls = type(value)
        arguments = {name: describe(argument) for name, argument in value._arguments.items()}
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot write down {value!r}: give it a class that derives from Described")


def build(description: dict[str, Any], base: type[T]) -> T:
    """The object of a description as `describe` makes them; it must be a `base`.

    Raises:
        ValueError: the class cannot be imported, or is no subclass of `base` that can be described.
    """
    path = description["class_path"]
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path}: install the package that defines it") from error
    if not (isinstance(cls, type) and issubclass(cls, base) and issubclass(cls, Described)):
        raise ValueError(f"{path} is not a {base.__name__}")
    arguments = description.get("init_args", {})
    return cls(**{name: _built(value) for name, value in arguments.items()})


def _built(value: Any) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return build(value, Described)
    if isinstance(value, list):
        return [_built(item) for item in value]
    return value


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Where two descriptions differ, one line a place: ``process.betas.class_path: a != b``."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            place = at if key == "init_args" else f"{at}.{key}".lstrip(".")
            lines += differences(ours.get(key), theirs.get(key), place)
        return lines
    return [] if ours == theirs else [f"{at}: {ours!r} != {theirs!r}"]
