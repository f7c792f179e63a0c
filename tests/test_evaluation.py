import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from expertdiff.describe import build, describe
from expertdiff.evaluation.cache import cached
from expertdiff.evaluation.features import FeatureExtractor, Pixels
from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.image_files import load_npz, save_grid, save_npz, to_uint8


class Bomb:
    """Unpickling this leaves a mark on the disk."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def features(count, dimensions, seed):
    """Correlated features: a random matrix with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return white @ (mixing * torch.logspace(0, -2, dimensions)) + 0.1 * seed


# Images -------------------------------------------------------------------------------------------


def test_to_uint8_cuts_fractions_off_and_clamps():
    x = torch.tensor([-1.0, 1.0, 0.0, 0.999, -1 + 1.99 / 127.5, -3.0, 7.0])
    assert to_uint8(x).tolist() == [0, 255, 127, 254, 1, 0, 255]
    # In bfloat16 255/256 + 1 would be 2.
    assert to_uint8(torch.tensor([255 / 256], dtype=torch.bfloat16)).tolist() == [254]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="diverged"):
        to_uint8(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_magnifies_small_images_without_smoothing(tmp_path, channels):
    tiles = images(6, channels, 8, 8)
    save_grid(tiles, tmp_path / "deep" / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    tile, border = 32, 2
    assert grid.shape == (2 * (tile + border) + border, 3 * (tile + border) + border, 3)
    row, column = 1, 2
    top, left = border + row * (tile + border), border + column * (tile + border)
    shown = grid[top : top + tile, left : left + tile]
    expected = tiles[row * 3 + column].expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert (shown == np.kron(expected, np.ones((4, 4, 1), dtype=np.uint8))).all()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_grid_leaves_large_images_as_they_are(tmp_path):
    tiles = images(2, 3, 40, 33)
    save_grid(tiles, tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid[2:42, 37:70] == tiles[1].permute(1, 2, 0).numpy()).all()


def test_npz_has_adms_layout_and_comes_back(tmp_path):
    samples, labels = images(5, 3, 4, 6), torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32)
    save_npz(samples, tmp_path / "samples", labels)
    with np.load(tmp_path / "samples", allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (5, 4, 6, 3)
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].dtype == np.int64
        assert (archive["arr_0"][2, 1, 5] == samples[2, :, 1, 5].numpy()).all()
    restored, restored_labels = load_npz(tmp_path / "samples")
    assert torch.equal(restored, samples)
    assert restored_labels.dtype == torch.int64 and restored_labels.tolist() == labels.tolist()
    save_npz(samples[:, :1], tmp_path / "grey.npz")
    restored, restored_labels = load_npz(tmp_path / "grey.npz")
    assert torch.equal(restored, samples[:, :1]) and restored_labels is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grey.npz", "samples"]


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"samples": np.zeros((2, 4, 4, 3), np.uint8)}, "no arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\[2, 3, 4, 4\]"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, "labels"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "labels"),
    ],
)
def test_npz_of_another_layout_is_refused(tmp_path, arrays, reason):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=reason):
        load_npz(tmp_path / "x.npz")


def test_npz_that_holds_pickles_is_refused_unread(tmp_path):
    bomb = np.array([Bomb(tmp_path / "mark")], dtype=object)
    np.savez(tmp_path / "inside.npz", arr_0=bomb)
    np.save(tmp_path / "raw.npy", bomb)
    for name in ("inside.npz", "raw.npy", "absent.npz"):
        with pytest.raises(ValueError, match=name):
            load_npz(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_truncated_npz_is_refused(tmp_path):
    save_npz(images(5, 3, 8, 8), tmp_path / "x.npz")
    whole = (tmp_path / "x.npz").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="x.npz"):
            load_npz(tmp_path / "x.npz")


# The Frechet distance -----------------------------------------------------------------------------


def test_distance_of_commuting_gaussians_is_the_closed_form():
    rotation, _ = torch.linalg.qr(features(12, 12, seed=1))
    a, b = torch.linspace(0.1, 3, 12).double(), torch.linspace(5, 0.2, 12).double()
    shift = torch.linspace(-1, 2, 12).double()
    first = Statistics(torch.zeros(12).double(), rotation @ a.diag() @ rotation.T, 100)
    second = Statistics(shift, rotation @ b.diag() @ rotation.T, 200)
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-10)


def test_distance_is_that_of_the_matrix_root():
    x, y = features(400, 40, seed=1), features(300, 40, seed=2)
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    expected = (
        (x.mean(0) - y.mean(0)).square().sum().item()
        + np.trace(np.cov(x, rowvar=False))
        + np.trace(np.cov(y, rowvar=False))
        - 2 * np.trace(root)
    )
    a, b = Statistics.of(x.float()), Statistics.of(y.float())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == frechet_distance(b, a)


@pytest.mark.parametrize("counts", [(20, 300), (300, 20), (20, 25), (61, 61), (2, 2)])
def test_distance_of_singular_covariances_is_exact(counts):
    """Against singular values of the features: tr (S1 S2)^(1/2) is a nuclear norm."""
    x, y = features(counts[0], 60, seed=1), features(counts[1], 60, seed=2)
    x[:, 3] = x[:, 4]
    y[:, 5] = 1
    centred = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    expected = (
        (x.mean(0) - y.mean(0)).square().sum()
        + centred[0].square().sum()
        + centred[1].square().sum()
        - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    )
    distance = frechet_distance(Statistics.of(x), Statistics.of(y))
    assert distance == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [10, 500])
def test_equal_sets_are_at_zero_and_never_below(count):
    for seed in range(10):
        statistics = Statistics.of(features(count, 50, seed))
        assert 0 <= frechet_distance(statistics, statistics) < 1e-6 * statistics.cov.trace()
    constant = Statistics.of(torch.ones(4, 50))
    assert frechet_distance(constant, constant) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    x = features(30, 8, seed=1)
    x[7, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        Statistics.of(x)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(count):
    with pytest.raises(ValueError, match=f"statistics of {count} images: .* give more"):
        Statistics.of(torch.zeros(count, 8))


def test_statistics_of_unknown_count_are_the_larger_set():
    """As of a file: the set that is known to be small is the one that is factored."""
    few, many = Statistics.of(features(20, 60, seed=1)), Statistics.of(features(300, 60, seed=2))
    unknown = Statistics(many.mean, many.cov, None)
    assert frechet_distance(few, unknown) == frechet_distance(few, many)
    assert frechet_distance(unknown, few) == frechet_distance(few, many)
    assert frechet_distance(unknown, unknown) < 1e-9 * many.cov.trace()


def test_features_of_different_extractors_are_refused():
    with pytest.raises(ValueError, match="of 8 and of 9 dimensions"):
        frechet_distance(Statistics.of(torch.rand(5, 8)), Statistics.of(torch.rand(5, 9)))


# What was computed of real images, on disk --------------------------------------------------------

KEY = dict(data_digest="d1", count=30, resolution=8, extractor="pixels")


def values(seed):
    return {"pool.mean": features(30, 8, seed).float(), "pool.count": 30, "score": seed + 0.1}


def kept(folder, seed=1, **changes):
    """What the cache returns when `seed` is what would be computed, and whether it was computed."""
    computed = []

    def compute():
        computed.append(seed)
        return values(seed)

    return cached(folder, compute, **KEY | changes), bool(computed)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_cache_computes_once_and_returns_the_same_bits(tmp_path):
    first, computed = kept(tmp_path / "new")
    again, computed_again = kept(tmp_path / "new", seed=2)
    assert computed and not computed_again and equal(first, again)
    assert again["pool.mean"].dtype == torch.float32
    assert type(again["pool.count"]) is int and type(again["score"]) is float
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [{"data_digest": "d2"}, {"count": 31}, {"resolution": 9}, {"extractor": "pixels, other"}],
)
def test_whatever_the_numbers_depend_on_names_another_file(tmp_path, change):
    kept(tmp_path)
    other, computed = kept(tmp_path, seed=2, **change)
    assert computed and equal(other, values(2))
    assert len(list(tmp_path.iterdir())) == 2


def test_broken_or_renamed_cache_is_computed_again(tmp_path):
    kept(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        found, computed = kept(tmp_path, seed=2)
        assert computed and equal(found, values(2))
        assert not kept(tmp_path)[1]
    path.write_bytes(whole)
    kept(tmp_path, seed=2, data_digest="d2")
    (other,) = set(tmp_path.iterdir()) - {path}
    os.replace(other, path)
    assert kept(tmp_path)[1]


def test_cache_survives_another_process_that_finishes_first(tmp_path):
    def compute():
        kept(tmp_path)
        return values(1)

    found = cached(tmp_path, compute, **KEY)
    stored, computed = kept(tmp_path)
    assert not computed and equal(stored, found)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_warned_of_and_not_needed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot keep .* of 30 images .*set XDG_CACHE_HOME"):
        found, computed = kept(tmp_path / "file" / "folder")
    assert computed and equal(found, values(1))


# Features -----------------------------------------------------------------------------------------


def test_pixels_are_the_pixels_and_not_called_fid():
    pixels = Pixels()
    assert pixels.metric == "FD-pixels"
    x = images(4, 1, 3, 5)
    assert torch.equal(pixels(x) * 255, x.flatten(1).float())
    assert describe(build(describe(pixels), FeatureExtractor)) == describe(pixels)


class Batched(Pixels):
    """Remembers how many images it was given at a time."""

    def extract(self, images):
        self.sizes = [*getattr(self, "sizes", []), len(images)]
        return super().extract(images)


def test_features_are_computed_of_some_images_at_a_time():
    x, batched = images(250, 1, 2, 2), Batched()
    assert torch.equal(batched(x), x.flatten(1) / 255) and batched.sizes == [100, 100, 50]
    assert torch.equal(batched.features(x, torch.device("cpu")), x.flatten(1) / 255)
    assert max(batched.sizes) == 100 and sum(batched.sizes) == 500


@pytest.mark.parametrize(
    "samples, reference, warned", [(65, 65, []), (64, 70, ["64 samples"]), (99, 64, ["64 images"])]
)
def test_fewer_images_than_a_covariance_of_pixels_needs_are_warned_of(samples, reference, warned):
    pixels = Pixels()
    sets = [pixels.summary(pixels(images(n, 1, 8, 8))) for n in (samples, reference)]
    # With one more than its dimensions the covariance has full rank, with as many it has not.
    assert (torch.linalg.matrix_rank(sets[0].cov) == 64) == (samples > 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels.distances(*sets)
    assert len(caught) == len(warned)
    for warning, text in zip(caught, warned):
        assert text in str(warning.message) and "below 65 images" in str(warning.message)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 8, 8), images(3, 8, 8), images(2, 4, 8, 8)])
def test_extractors_refuse_what_is_not_an_image_in_bytes(wrong):
    with pytest.raises(ValueError, match="to_uint8"):
        Pixels()(wrong)


def test_reference_is_the_datas_own_split_or_a_file_of_the_same_resolution(tmp_path):
    pixels, cpu = Pixels(), torch.device("cpu")
    x = images(230, 1, 8, 8)
    own = pixels.reference("validation", x, cpu)
    assert own.name == "validation" and own.count == 230 and own.text == "validation (230 items)"
    save_npz(x, tmp_path / "real.npz")
    file = pixels.read(tmp_path / "real.npz", (1, 8, 8), cpu)
    assert file.name.startswith("real.npz, sha256 ") and file.count == 230
    assert pixels.distances(file.summary, own.summary) == {"FD-pixels": 0}
    with pytest.raises(
        ValueError, match=r"real.npz holds .*\[1, 8, 8\].*samples are \[1, 16, 16\]"
    ):
        pixels.read(tmp_path / "real.npz", (1, 16, 16), cpu)


class Probe(Pixels):
    """A matrix product of its pixels, which autocast would round."""

    def extract(self, images):
        assert not torch.backends.cudnn.allow_tf32
        x = super().extract(images)
        return x @ x.T


def test_features_are_float32_inside_autocast():
    x = images(2, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Probe()(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, Probe()(x))
