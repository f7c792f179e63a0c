"""Distributions on the plane: what the 2-D data sets are drawn from, and what is known of them.

`Circle`, `Dino`, `Line` and `Moons` are, point for point, the sets that DualDiff was published on
(SakanaAI/AI-Scientist, templates/2d_diffusion).
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.special import ndtri

from expertdiff.data.base import Split, permutation
from expertdiff.data.folder import eight_bits
from expertdiff.describe import Described
from expertdiff.diffusion.exact import Mixture

SEEDS: dict[Split, int] = {"train": 42, "validation": 43}
CELL = 0.05
"""Side of a cell of a filled area's quadrature; std CELL / 2 is then flat to 1.5 %."""


class Density(Described, ABC):
    """A distribution on the plane; a drawn point x stands for the user's ``centre + unit * x``.

    Attributes:
        centre: where the user's coordinates have the origin of ours.
        unit: how much of the user's coordinates is 1 of ours.
    """

    centre: tuple[float, float] = (0.0, 0.0)
    unit: float = 1.0

    @abstractmethod
    def points(self, split: Split, n: int) -> np.ndarray:
        """`n` points [n, 2] of a split, float64, always the same; from a file at most all of it."""

    def mixture(self) -> Mixture | None:
        """The density itself, or a fine quadrature of it; ``None`` where it is unknown."""
        return None

    def modes(self) -> Mixture | None:
        """The separate modes, 3.5 std reaching their edge; ``None`` where there are none."""
        return None


class Generated(Density):
    """A density that is drawn from: training points with one seed, validation with another."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` points [n, 2], float64."""

    def points(self, split: Split, n: int) -> np.ndarray:
        return self.draw(np.random.default_rng(SEEDS[split]), n)


class Circle(Generated):
    """17 discs of radius 0.09 and density 1/r ("circle").

    One in the middle (share 0.04), 8 in the directions of the axes and diagonals (0.08 each) and 8
    in those of slope 2 and 1/2 (0.04 each), at radius 3.
    """

    radius = 0.09

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        u = np.stack([rng.uniform(-0.5, 0.5, n), rng.uniform(-0.5, 0.5, n)], axis=1)
        v = np.round(u / 2, 1) * 2
        v /= np.linalg.norm(v, axis=1, keepdims=True) + 1e-10
        angle, r = 2 * np.pi * rng.uniform(0, 1, n), rng.uniform(0, 0.03, n)
        return 3 * (v + r[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))

    def mixture(self) -> Mixture:
        """10 rings a disc, r being uniform, of cells about as long as they are wide."""
        width = self.radius / 10
        radii = width * (np.arange(10) + 0.5)
        counts = np.round(2 * np.pi * radii / width).astype(np.int64)
        rings = np.concatenate([r * turn(np.arange(n) / n) for r, n in zip(radii, counts)])
        centres, shares, _ = (tensor.numpy() for tensor in self.modes())
        within = shares[:, None] * np.repeat(0.1 / counts, counts)
        return mixture_of(centres[:, None] + rings, width / math.sqrt(12), within)

    def modes(self) -> Mixture:
        grid = np.stack(np.meshgrid(*2 * [np.arange(-2, 3)]), axis=-1).reshape(-1, 2)
        directions = np.round(grid / np.linalg.norm(grid, axis=1, keepdims=True).clip(1e-10), 12)
        centres, times = np.unique(directions, axis=0, return_counts=True)
        return mixture_of(3 * centres, self.radius / 3.5, times / 25)


class Dino(Generated):
    """Gaussians (sigma 0.0111, 0.0125) about the points of the Datasaurus ("dino").

    A point (x, y) of the file is ``(4 (x / 54 - 1), 4 (y / 48 - 1))`` here.

    Args:
        path: a CSV file of x, y; without, the 142 points of the installed distribution
            ``data-morph-ai``.

    Raises:
        ValueError: later: neither is there, or the file is not one of points.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path

    @cached_property
    def _points(self) -> np.ndarray:
        return read_points(Path(self.path) if self.path else installed_dino())

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        which = rng.integers(0, len(self._points), n)
        x = self._points[which, 0] + 0.15 * rng.normal(size=n)
        y = self._points[which, 1] + 0.15 * rng.normal(size=n)
        return np.stack([(x / 54 - 1) * 4, (y / 48 - 1) * 4], axis=1)

    def mixture(self) -> Mixture:
        return mixture_of((self._points / (54, 48) - 1) * 4, (0.15 / 54 * 4, 0.15 / 48 * 4))

    def modes(self) -> Mixture:
        return self.mixture()


class Line(Generated):
    """The filled rectangle [-2, 2] x [-4, 4] ("line")."""

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        x, y = rng.uniform(-0.5, 0.5, n), rng.uniform(-1, 1, n)
        return 4 * np.stack([x, y], axis=1)

    def mixture(self) -> Mixture:
        return mixture_of(cells(4, 8), CELL / 2)


class Checkerboard(Generated):
    """The 8 dark squares, of side 2, of a board [-4, 4]^2."""

    corners = np.array([(x, y) for x in range(-4, 4, 2) for y in range(-4, 4, 2) if (x + y) % 4])

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return self.corners[rng.integers(0, 8, n)] + rng.uniform(0, 2, (n, 2))

    def mixture(self) -> Mixture:
        return mixture_of(self.corners[:, None] + 1 + cells(2, 2), CELL / 2)


class Gaussians(Generated):
    """Equal Gaussians of std 0.15: 8 on a circle of radius 4, or 25 on a 5 x 5 grid of step 2.

    Args:
        modes: 8 or 25.

    Raises:
        ValueError: any other number.
    """

    std = 0.15

    def __init__(self, modes: int = 8) -> None:
        if modes not in (8, 25):
            raise ValueError(f"modes {modes} must be 8 (a circle) or 25 (a grid)")
        grid = np.stack(np.meshgrid(*2 * [np.linspace(-4, 4, 5)]), axis=-1).reshape(-1, 2)
        self._centres = grid if modes == 25 else 4 * turn(np.arange(8) / 8)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        which = rng.integers(0, len(self._centres), n)
        return self._centres[which] + self.std * rng.normal(size=(n, 2))

    def mixture(self) -> Mixture:
        return mixture_of(self._centres, self.std)

    def modes(self) -> Mixture:
        return self.mixture()


class Curves(Generated):
    """Equally likely arms, each a curve with Gaussian noise about it.

    Attributes:
        arms: how many curves.
        std: of the noise, on each axis.
    """

    arms: int
    std: tuple[float, float]

    @abstractmethod
    def curve(self, arm: np.ndarray, u: np.ndarray) -> np.ndarray:
        """The points [..., 2] of the arms (int64 [...]) at u in (0, 1), which is uniform."""

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        arm, u = rng.integers(0, self.arms, n), rng.uniform(0, 1, n)
        return self.curve(arm, u) + self.std * rng.normal(size=(n, 2))

    def mixture(self) -> Mixture:
        """Gaussians about 500 points of each arm."""
        arm, u = np.meshgrid(np.arange(self.arms), (np.arange(500) + 0.5) / 500)
        return mixture_of(self.curve(arm, u), self.std)


class Moons(Curves):
    """Two half circles, stretched ("moons"), drawn by scikit-learn."""

    arms, std = 2, (0.06, 0.09)

    def points(self, split: Split, n: int) -> np.ndarray:
        from sklearn.datasets import make_moons  # slow to import

        return self._stretched(make_moons(n, noise=0.03, random_state=SEEDS[split])[0])

    def curve(self, arm: np.ndarray, u: np.ndarray) -> np.ndarray:
        upper = turn(u / 2)
        return self._stretched(np.where(arm[..., None] == 0, upper, (1, 0.5) - upper))

    def _stretched(self, points: np.ndarray) -> np.ndarray:
        return (points + 0.3) * (2, 3) - 1


class Spirals(Curves):
    """Two spirals of Archimedes of one and a half turns, out to radius 4."""

    arms, std = 2, (0.08, 0.08)

    def curve(self, arm: np.ndarray, u: np.ndarray) -> np.ndarray:
        r = np.sqrt(u)  # about as many points everywhere along the arm
        return 4 * r[..., None] * turn(1.5 * r + arm / 2)


class Pinwheel(Curves):
    """Five arms that bend as they go out; the radius is Gaussian, of mean 2 and std 0.5."""

    arms, std = 5, (0.12, 0.12)

    def curve(self, arm: np.ndarray, u: np.ndarray) -> np.ndarray:
        r = 2 + 0.5 * ndtri(u)
        return r[..., None] * turn(arm / 5 + r / 8)


class Rings(Curves):
    """Four rings, of radius 1 to 4, with equal shares."""

    arms, std = 4, (0.08, 0.08)

    def curve(self, arm: np.ndarray, u: np.ndarray) -> np.ndarray:
        return (arm[..., None] + 1) * turn(u)


class PointsFile(Density):
    """The points of a CSV file of two columns, with or without a header line.

    A fixed tenth of the points is set apart for validation. The training points get mean 0 and
    root-mean-square radius 2.5, about that of the published sets, by one scale for both axes.

    Args:
        path: the file.

    Raises:
        ValueError: later: a file that cannot be read, has fewer than 100 points, or all alike.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path

    @cached_property
    def _splits(self) -> dict[Split, np.ndarray]:
        """The points of each split, in the user's coordinates."""
        points = read_points(Path(self.path))
        if len(points) < 100:
            raise ValueError(f"{self.path} has {len(points)} points: give at least 100")
        points, apart = points[permutation(len(points), "points")], len(points) // 10
        return {"train": points[apart:], "validation": points[:apart]}

    @cached_property
    def centre(self) -> tuple[float, float]:
        x, y = self._splits["train"].mean(axis=0).tolist()
        return x, y

    @cached_property
    def unit(self) -> float:
        points = self._splits["train"]
        if not np.ptp(points, axis=0).any():
            raise ValueError(f"the points of {self.path} are all {points[0].tolist()}: give others")
        return math.sqrt(np.square(points - self.centre).sum(axis=1).mean()) / 2.5

    def points(self, split: Split, n: int) -> np.ndarray:
        return (self._splits[split][:n] - self.centre) / self.unit

    def mixture(self) -> Mixture:
        """The training points themselves: its denoiser gives nothing but them."""
        return mixture_of(self.points("train", len(self._splits["train"])), 0)


class Picture(Generated):
    """A picture as a density: the darker a pixel, the more points it gets, evenly inside it.

    The longer side spans [-4, 4]. Transparency is white. Pictures above 256 pixels are shrunk.

    Args:
        path: the file, of any format that PIL reads.

    Raises:
        ValueError: later: it cannot be decoded, or is all white.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path

    @cached_property
    def _pixels(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Centres [K, 2] of the pixels that are not white, their shares [K], and a pixel's side."""
        dark = 255 - grey_values(Path(self.path)).astype(np.float64)
        if not dark.any():
            raise ValueError(f"{self.path} is all white: give a picture with something dark on it")
        side = 8 / max(dark.shape)
        row, column = dark.nonzero()
        middle = (np.array(dark.shape) - 1) / 2
        centres = side * np.stack([column - middle[1], middle[0] - row], axis=1)
        return centres, dark[row, column] / dark.sum(), side

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        centres, shares, side = self._pixels
        which = rng.choice(len(shares), n, p=shares)
        return centres[which] + side * rng.uniform(-0.5, 0.5, (n, 2))

    def mixture(self) -> Mixture:
        centres, shares, side = self._pixels
        return mixture_of(centres, side / math.sqrt(12), shares)


def cells(width: float, height: float) -> np.ndarray:
    """The centres [K, 2] of the cells of a rectangle about the origin."""
    x, y = (CELL * (np.arange(round(side / CELL)) + 0.5) - side / 2 for side in (width, height))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def turn(turns: np.ndarray) -> np.ndarray:
    """The points [..., 2] of the unit circle at this many turns from (1, 0)."""
    return np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=-1)


def mixture_of(
    centres: np.ndarray, std: float | tuple[float, float], shares: np.ndarray | None = None
) -> Mixture:
    """The mixture of `centres` [..., 2]; `shares` [...] are equal where none are given."""
    centres = torch.from_numpy(centres).double().reshape(-1, 2)
    equal = torch.full((len(centres),), 1 / len(centres), dtype=torch.float64)
    shares = equal if shares is None else torch.from_numpy(shares).reshape(-1)
    return Mixture(centres, shares, torch.tensor(np.broadcast_to(std, 2), dtype=torch.float64))


def read_points(path: Path) -> np.ndarray:
    """The points [N, 2], float64, of a CSV file; a first line without any number is a header.

    Raises:
        ValueError: it cannot be read, has no points, or a line has anything but two finite numbers.
    """
    try:
        lines = path.expanduser().read_text("utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}): give the path of a CSV file of x, y"
        ) from error
    points = []
    for i, line in enumerate(lines, 1):
        row = [number(field) for field in line.split(",")]
        header = i == 1 and row == [None] * len(row)
        if len(row) == 2 and None not in row and np.isfinite(row).all():
            points.append(row)
        elif line.strip() and not header:
            raise ValueError(
                f"line {i} of {path} is {line[:80]!r}: correct it to two numbers, as in 1.5,-2"
            )
    if not points:
        raise ValueError(f"{path} has no points: give a CSV file of x, y")
    return np.array(points)


def number(text: str) -> float | None:
    """The number that `text` is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def installed_dino() -> Path:
    """Where the distribution ``data-morph-ai`` keeps the dinosaur; it is not imported.

    Raises:
        ValueError: it is not installed.
    """
    name = "data_morph/data/starter_shapes/dino.csv"
    for distribution in distributions(name="data-morph-ai"):
        path = Path(distribution.locate_file(name))
        if path.is_file():
            return path
    raise ValueError(
        "the dinosaur's points are not installed: run pip install --no-deps data-morph-ai, "
        "or give Dino the path of a file of x, y"
    )


def grey_values(path: Path) -> np.ndarray:
    """The grey values of a picture as uint8 [height, width], at most 256 pixels a side.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with Image.open(path.expanduser()) as file:
            image = eight_bits(ImageOps.exif_transpose(file)).convert("RGBA")
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot decode {path} ({reason}): repair or replace it") from error
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("L")
    image.thumbnail((256, 256), Image.Resampling.BOX)
    return np.asarray(image)
