"""The 2-D sets: what they are, that they stay so, and what users' files may be."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from expertdiff.data import (
    Checkerboard,
    Circle,
    Density,
    Dino,
    Gaussians,
    Line,
    Moons,
    Picture,
    Pinwheel,
    PointsFile,
    RealAndGenerated,
    Rings,
    Spirals,
    Toy2D,
)
from expertdiff.data import densities as module
from expertdiff.describe import build, describe
from expertdiff.evaluation.kinds import kind

GENERATED = [
    Checkerboard(),
    Circle(),
    Gaussians(),
    Gaussians(25),
    Line(),
    Moons(),
    Pinwheel(),
    Rings(),
    Spirals(),
]
N = 20_000


def write(path, rows, header="x,y\n"):
    path.write_text(header + "".join(f"{x},{y}\n" for x, y in rows))
    return path


@pytest.fixture
def dino(tmp_path):
    """142 points on a grid as wide apart as the real ones, in the file's coordinates."""
    grid = [(5.0 + 8 * i, 3.0 + 7 * j) for i in range(12) for j in range(12)]
    return Dino(write(tmp_path / "dino.csv", grid[:142]))


@pytest.fixture
def picture(tmp_path):
    """4 wide and 2 high: black at the bottom left, grey (127) at the top right, else white."""
    grey = np.full((2, 4), 255, np.uint8)
    grey[1, 0], grey[0, 3] = 0, 127
    Image.fromarray(grey).save(tmp_path / "picture.png")
    return Picture(tmp_path / "picture.png")


@pytest.fixture
def cloud(tmp_path):
    """200 points, far from the origin and wider than high."""
    points = np.random.default_rng(0).normal(size=(200, 2)) * (30, 10) + (100, -5)
    return PointsFile(write(tmp_path / "cloud.csv", points)), points


def moments(mixture):
    mean = mixture.shares @ mixture.centres
    variance = mixture.shares @ (mixture.centres - mean) ** 2 + mixture.std**2
    return mean.numpy(), variance.sqrt().numpy()


# --- every set ---


@pytest.fixture(params=[*GENERATED, "dino", "picture"], ids=lambda p: str(describe(p)))
def density(request):
    return (
        request.getfixturevalue(request.param) if isinstance(request.param, str) else request.param
    )


def test_points_are_of_the_size_of_the_published_sets(density):
    points = density.points("train", N)
    assert points.shape == (N, 2) and points.dtype == np.float64
    assert np.abs(points).max() < 5 and 0.8 < np.sqrt((points**2).sum(1).mean()) < 5


def test_two_builds_are_bit_equal_and_the_splits_differ(density):
    again = build(describe(density), Density)
    for split in ("train", "validation"):
        assert np.array_equal(density.points(split, 500), again.points(split, 500))
    assert not np.isin(density.points("train", 500), density.points("validation", 500)).any()


def test_mixture_has_the_mass_the_mean_and_the_width_of_the_points(density):
    mixture, points = density.mixture(), density.points("train", N)
    assert mixture.shares.sum().item() == pytest.approx(1) and (mixture.shares > 0).all()
    assert mixture.centres.shape == (len(mixture.shares), 2) and mixture.std.shape == (2,)
    assert {tensor.dtype for tensor in mixture} == {torch.float64}
    mean, std = moments(mixture)
    assert mean == pytest.approx(points.mean(0), abs=5 * std.max() / math.sqrt(N))
    assert std == pytest.approx(points.std(0), rel=0.02)


def test_mixture_says_how_probable_the_points_are(density):
    """The log-likelihood of fresh points equals that of points of the mixture itself."""
    mixture = density.mixture()
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(mixture.shares, 1000, replacement=True, generator=generator)
    noise = torch.randn((1000, 2), generator=generator, dtype=torch.float64)
    own = mixture.centres[which] + mixture.std * noise
    fresh = torch.from_numpy(density.points("validation", 1000))

    def log_likelihood(x):
        # With noise of 0.05, beside which a quadrature's cells are small.
        x = x + 0.05 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        variance = mixture.std**2 + 0.05**2
        square = ((x[:, None] - mixture.centres).square() / variance).sum(2)
        return (mixture.shares.log() - square / 2).logsumexp(1)

    a, b = log_likelihood(fresh), log_likelihood(own)
    assert (a.mean() - b.mean()).abs() < 5 * (a.var() / 1000 + b.var() / 1000).sqrt()


@pytest.mark.parametrize(
    "density, count", [(Gaussians(), 8), (Gaussians(25), 25), (Circle(), 17), ("dino", 142)]
)
def test_modes_reach_their_edge_and_have_their_shares(density, count, request):
    density = request.getfixturevalue(density) if isinstance(density, str) else density
    modes, points = density.modes(), torch.from_numpy(density.points("train", N))
    distance, nearest = torch.cdist(points / modes.std, modes.centres / modes.std).min(1)
    assert len(modes.centres) == count
    assert (distance < 3.5).double().mean() > 0.997
    assert (distance > 3).any()
    found = nearest.bincount(minlength=count) / N
    assert (found - modes.shares).abs().max() < 5 * math.sqrt(0.12 / N)


@pytest.mark.parametrize("density", [Line(), Moons(), Rings()], ids=lambda d: type(d).__name__)
def test_connected_sets_have_no_modes(density):
    assert density.modes() is None


# --- the published sets ---


def test_circle_is_17_discs():
    modes = Circle().modes()
    radius = modes.centres.norm(dim=1)
    angle = torch.atan2(*modes.centres.T.flip(0)).rad2deg().abs()
    inner = radius < 1e-6
    axis = (angle % 45 < 1e-6) | (angle % 45 > 45 - 1e-6)
    assert inner.sum() == 1 and (~inner & axis).sum() == 8 and (~inner & ~axis).sum() == 8
    torch.testing.assert_close(radius[~inner], torch.full((16,), 3.0, dtype=torch.float64))
    expected = torch.where(inner, 0.04, torch.where(axis, 0.08, 0.04)).double()
    torch.testing.assert_close(modes.shares, expected)
    slope = (modes.centres[:, 1] / modes.centres[:, 0]).abs()[~inner & ~axis]
    assert torch.isin(slope.mul(2).round(), torch.tensor([1.0, 4.0]).double()).all()


def test_circle_is_uniform_in_the_distance_from_its_discs_centres():
    density = Circle()
    centres = density.modes().centres
    r = torch.cdist(torch.from_numpy(density.points("train", N)), centres).amin(1)
    assert r.max() <= 0.09 + 1e-6
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(r.quantile(quantiles), 0.09 * quantiles, atol=0.002, rtol=0)


def test_dino_is_gaussians_about_the_points(dino):
    mixture = dino.mixture()
    assert mixture.std.tolist() == pytest.approx([0.15 / 54 * 4, 0.15 / 48 * 4])
    first = [(5 / 54 - 1) * 4, (3 / 48 - 1) * 4]
    assert mixture.centres[0].tolist() == pytest.approx(first)
    points = torch.from_numpy(dino.points("train", N))
    nearest = torch.cdist(points, mixture.centres).argmin(1)
    z = (points - mixture.centres[nearest]) / mixture.std
    torch.testing.assert_close(z.std(0), torch.ones(2).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), atol=0.04, rtol=0)


def test_dino_draws_the_index_then_x_then_y(dino):
    rng, file = np.random.default_rng(42), np.loadtxt(dino.path, delimiter=",", skiprows=1)
    which = rng.integers(0, 142, 1000)
    x = file[which, 0] + 0.15 * rng.normal(size=1000)
    y = file[which, 1] + 0.15 * rng.normal(size=1000)
    points = dino.points("train", 1000)
    assert np.array_equal(points[:, 0], (x / 54 - 1) * 4)
    assert np.array_equal(points[:, 1], (y / 48 - 1) * 4)


def test_the_installed_dino_has_its_142_points():
    mixture = Dino().mixture()
    assert mixture.centres.shape == (142, 2)
    distance = torch.cdist(mixture.centres, mixture.centres).fill_diagonal_(math.inf).amin(1)
    assert 0.06 < distance.min() < 0.08 and 0.5 < distance.max() < 0.54
    first = [(55.3846 / 54 - 1) * 4, (97.1795 / 48 - 1) * 4]
    assert mixture.centres[0].tolist() == pytest.approx(first)


def test_a_missing_dino_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "distributions", lambda name: [])
    with pytest.raises(ValueError, match="pip install --no-deps data-morph-ai"):
        Dino().points("train", 100)


def test_line_is_a_filled_rectangle():
    points = Line().points("train", N)
    assert (np.abs(points) <= (2, 4)).all() and (np.abs(points).max(0) > (1.99, 3.99)).all()
    cells = np.histogram2d(*points.T, bins=(4, 8), range=[(-2, 2), (-4, 4)])[0]
    assert np.abs(cells / N * 32 - 1).max() < 5 * math.sqrt(32 / N)
    rng = np.random.default_rng(42)
    assert np.array_equal(points[:, 0], 4 * rng.uniform(-0.5, 0.5, N))
    assert np.array_equal(points[:, 1], 4 * rng.uniform(-1, 1, N))


def test_moons_are_two_arcs():
    x, y = (Moons().points("train", N) + 1).T / np.array([[2], [3]]) - 0.3
    upper, lower = np.hypot(x, y), np.hypot(x - 1, y - 0.5)
    residual = np.where(np.abs(upper - 1) < np.abs(lower - 1), upper, lower) - 1
    assert residual.std() == pytest.approx(0.03, rel=0.03)


def test_checkerboard_fills_every_other_square():
    x, y = np.floor(Checkerboard().points("train", N).T / 2).astype(int)
    assert ((x + y) % 2 == 1).all() and len(set(zip(x, y))) == 8


@pytest.mark.parametrize("modes", [1, 9, 24])
def test_other_numbers_of_gaussians_are_refused(modes):
    with pytest.raises(ValueError, match=f"modes {modes} must be 8"):
        Gaussians(modes)


# --- a file of points ---


def test_points_come_back_in_the_users_units(cloud):
    density, points = cloud
    parts = [density.points(split, 1000) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [180, 20]
    train = parts[0]
    assert train.mean(0) == pytest.approx([0, 0], abs=1e-12)
    assert np.sqrt((train**2).sum(1).mean()) == pytest.approx(2.5)
    back = density.centre + density.unit * np.concatenate(parts)
    order = np.lexsort(back.T)
    np.testing.assert_allclose(back[order], points[np.lexsort(points.T)], rtol=1e-9)
    mixture = density.mixture()
    assert np.array_equal(mixture.centres.numpy(), train) and not mixture.std.any()


def test_coordinates_far_from_the_origin_stay_apart(tmp_path):
    points = np.random.default_rng(0).normal(size=(200, 2)) * 10 + (4.5e5, 4.6e6)
    density = PointsFile(write(tmp_path / "utm.csv", points))
    data = Toy2D(density)
    x, identity = data.split("train")[0], data.identity()
    drawn = kind(identity).save(x, None, tmp_path, identity["scale"])
    own = density.centre + density.unit * density.points("train", 1000)
    np.testing.assert_allclose(module.read_points(drawn), own, rtol=0, atol=1e-5)
    items, labels = RealAndGenerated(data, drawn).split("train")
    torch.testing.assert_close(items[labels == 0], items[labels == 1], rtol=0, atol=1e-6)


def test_a_first_line_of_numbers_is_a_point(tmp_path):
    rows = [(i, i * i) for i in range(100)]
    with_header = PointsFile(write(tmp_path / "a.csv", rows))
    without = PointsFile(write(tmp_path / "b.csv", rows, header=""))
    assert np.array_equal(with_header.points("train", 1000), without.points("train", 1000))


@pytest.mark.parametrize("line", ["1,two", "nan,1", "1,", "1,2,3", "1;2", "inf,0", "x,y"])
def test_a_line_that_is_no_point_is_named(tmp_path, line):
    rows = write(tmp_path / "points.csv", [(i, i) for i in range(150)]).read_text()
    (tmp_path / "points.csv").write_text(rows + line + "\n")
    with pytest.raises(ValueError, match=rf"line 152 of .*points.csv is '{line}'"):
        PointsFile(tmp_path / "points.csv").points("train", 10)


def test_a_first_line_with_one_number_is_no_header(tmp_path):
    path = write(tmp_path / "points.csv", [(i, i) for i in range(150)], header="1,two\n")
    with pytest.raises(ValueError, match="line 1 of"):
        PointsFile(path).points("train", 10)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "has no points"),
        ([(i, i) for i in range(99)], "has 99 points: give at least 100"),
        ([(3, 4)] * 100, r"are all \[3.0, 4.0\]"),
    ],
)
def test_too_few_or_equal_points_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        PointsFile(write(tmp_path / "points.csv", rows)).points("train", 10)


def test_files_that_are_not_there_are_named(tmp_path):
    for density in (PointsFile(tmp_path / "no.csv"), Dino(tmp_path / "no.csv")):
        with pytest.raises(ValueError, match="cannot read .*no.csv"):
            density.points("train", 10)
    with pytest.raises(ValueError, match="cannot decode .*no.png"):
        Picture(tmp_path / "no.png").points("train", 10)


# --- a picture ---


def test_picture_puts_points_where_it_is_dark(picture):
    points = picture.points("train", N)
    black = (np.floor(points / 2) == (-2, -1)).all(1)
    grey = (np.floor(points / 2) == (1, 0)).all(1)
    assert (black | grey).all()
    assert grey.mean() == pytest.approx(128 / (128 + 255), abs=0.02)
    inside = (points[black] - (-4, -2)) / 2
    assert inside.std(0) == pytest.approx(1 / math.sqrt(12), rel=0.03)
    mixture = picture.mixture()
    assert mixture.centres.tolist() == [[3, 1], [-3, -1]]
    assert mixture.std.tolist() == pytest.approx(2 * [2 / math.sqrt(12)])


def test_transparency_is_white_and_16_bits_are_read(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    deep = np.full((2, 2), 65535, np.uint16)
    deep[0, 0] = 0
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("clear.png", "deep.png"):
        assert Picture(tmp_path / name).mixture().centres.tolist() == [[-2, 2]]


def test_a_large_picture_is_shrunk(tmp_path):
    Image.new("L", (1000, 500), 0).save(tmp_path / "large.png")
    mixture = Picture(tmp_path / "large.png").mixture()
    assert len(mixture.centres) == 256 * 128
    assert mixture.centres.abs().amax(0).tolist() == pytest.approx([4 - 4 / 256, 2 - 4 / 256])


def test_white_and_undecodable_pictures_are_refused(tmp_path):
    Image.new("L", (5, 5), 255).save(tmp_path / "white.png")
    with pytest.raises(ValueError, match="white.png is all white"):
        Picture(tmp_path / "white.png").points("train", 10)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot decode .*broken.png"):
        Picture(tmp_path / "broken.png").points("train", 10)


# --- the data set ---


def test_toy_gives_the_densitys_points_as_they_are():
    data = Toy2D(Moons(), samples=1000, validation_samples=200)
    n = 1000  # of each split; validation_samples only limits a validation
    for split in ("train", "validation", "reference"):
        items, labels = data.split(split)
        name = "train" if split == "train" else "validation"
        assert np.array_equal(items.numpy(), Moons().points(name, n).astype(np.float32))
        assert labels.dtype == torch.int64 and labels.shape == (n,) and not labels.any()
        assert torch.equal(data.scaled(items), items)
    assert data.shape == (2,) and data.num_classes is None


def test_toy_identity_tells_the_scale_and_the_points(cloud):
    density, _ = cloud
    data = Toy2D(density)
    identity = json.loads(json.dumps(data.identity()))
    assert identity["n"] == 180
    assert identity["scale"] == {"centre": list(density.centre), "unit": density.unit}
    plain = Toy2D(Gaussians(25), samples=100).identity()
    assert plain["scale"] == {"centre": [0.0, 0.0], "unit": 1.0}
    assert plain["digest"] != Toy2D(Gaussians(8), samples=100).identity()["digest"]


def test_toy_is_built_again_from_its_description():
    data = Toy2D(Gaussians(25), samples=150, reference="train")
    again = build(describe(data), Toy2D)
    assert torch.equal(data.split("reference")[0], again.split("reference")[0])
    assert len(again.split("reference")[0]) == 150


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="99 samples"):
        Toy2D(Line(), samples=99)
