"""Images or points: what drawn samples are turned into, kept as and shown as."""

from collections.abc import Sequence
from types import ModuleType

from expertdiff.evaluation import images, points


def kind(shape: Sequence[int]) -> ModuleType:
    """The module for samples of this shape: `images` (C, H, W), or `points` (D,).

    Each has ``finished(x)`` (what a sampler made, as the data set holds it), ``save(samples,
    labels, folder, scale)``, ``picture(samples, path)`` and ``SHOWN``, how many a picture shows.
    """
    return points if len(shape) == 1 else images
