"""Statistics that others published: read as they come, refused in one sentence."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expertdiff.evaluation import reference
from expertdiff.evaluation.inception import Inception, Summary
from expertdiff.evaluation.reference import read_reference
from expertdiff.image_files import save_npz

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:left out")
POOL, SPATIAL = 20, 13


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Of 2,048 and 2,023 dimensions, each file would have 66 MB."""
    assert (reference.POOL, reference.SPATIAL) == (2048, 17 * 17 * 7)
    monkeypatch.setattr(reference, "POOL", POOL)
    monkeypatch.setattr(reference, "SPATIAL", SPATIAL)


class Bomb:
    """Unpickling this leaves a mark on the disk."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def gaussian(dimensions, mean, variance, dtype=np.float64):
    return np.full(dimensions, mean, dtype), np.eye(dimensions) * variance


def moments(mean=0.0, variance=1.0, dtype=np.float64):
    """The arrays of a file: pool_3 N(mean, variance), spatial features N(2 mean, variance)."""
    mu, sigma = gaussian(POOL, mean, variance, dtype)
    mu_s, sigma_s = gaussian(SPATIAL, 2 * mean, variance, dtype)
    return {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}


def written(path, arrays):
    """A file as ADM and EDM (.npz), or torch-fidelity (.pt), write it."""
    if path.suffix == ".pt":
        torch.save(arrays, path)
    else:
        np.savez(path, **arrays)
    return path


def test_statistics_are_read_in_float64_whatever_they_are_in(tmp_path):
    arrays = moments(0.1, 2.0, np.float32)  # torch-fidelity: mu float32, sigma float64
    for path in (tmp_path / "adm.npz", tmp_path / "fidelity.pt"):
        images, pool, spatial = read_reference(written(path, arrays))
        assert images is None and pool.count is None
        for statistics, mu, sigma in ((pool, "mu", "sigma"), (spatial, "mu_s", "sigma_s")):
            assert statistics.mean.dtype == statistics.cov.dtype == torch.float64
            assert (statistics.mean.numpy() == arrays[mu]).all()
            assert (statistics.cov.numpy() == arrays[sigma]).all()


@pytest.mark.parametrize("core", [b"numpy._core.", b"numpy.core."])
def test_files_of_numpy_1_and_2_are_read(tmp_path, core):
    path = written(tmp_path / "here.pt", moments())
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "there.pt", "w") as archive:
        for name, part in parts.items():
            if name.endswith("data.pkl"):
                assert b"core.multiarray" in part
                part = part.replace(b"numpy._core.", core).replace(b"numpy.core.", core)
            archive.writestr(name, part)
    assert torch.equal(read_reference(tmp_path / "there.pt").pool.mean, torch.zeros(POOL).double())


def test_distances_to_diagonal_gaussians_are_the_closed_form(tmp_path):
    inception = Inception()
    one, two = moments(0.25, 1.0), moments(0.5, 4.0)
    parts = read_reference(written(tmp_path / "one.npz", one))
    samples = Summary(*(replace(part, count=5000) for part in parts[1:]))
    numbers = {"FID": POOL * (0.25**2 + 1), "sFID": SPATIAL * (0.5**2 + 1)}
    adm = inception.read(written(tmp_path / "adm.npz", two), (3, 8, 8), CPU)
    assert inception.distances(samples, adm.summary) == pytest.approx(numbers, rel=1e-9)
    # EDM's files have no spatial features.
    edm = written(tmp_path / "edm.npz", {name: two[name] for name in ("mu", "sigma")})
    edm = inception.read(edm, (3, 8, 8), CPU)
    assert edm.count is None and edm.text.endswith("(statistics)")
    numbers.pop("sFID")
    assert inception.distances(samples, edm.summary) == pytest.approx(numbers, rel=1e-9)


def test_a_file_may_hold_images_too(tmp_path):
    images = torch.arange(5 * 3 * 8 * 8).reshape(5, 3, 8, 8).to(torch.uint8)
    save_npz(images, tmp_path / "images.npz")
    assert torch.equal(read_reference(tmp_path / "images.npz").images, images)
    nhwc = images.permute(0, 2, 3, 1).numpy()
    both = read_reference(written(tmp_path / "both.npz", moments() | {"arr_0": nhwc}))
    assert torch.equal(both.images, images) and both.pool.cov.trace() == POOL


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"mu \[64\].*have 20 dimensions"),
        ({"sigma": np.eye(7)}, r"sigma \[7, 7\].*have 20 dimensions"),
        ({"mu_s": np.zeros(POOL)}, r"mu_s \[20\].*have 13 dimensions"),
        ({"mu": np.full(POOL, np.nan)}, "mu or sigma is not finite"),
        ({"sigma_s": np.full((SPATIAL, SPATIAL), np.inf)}, "mu_s or sigma_s is not finite"),
    ],
)
def test_other_statistics_are_refused(tmp_path, name, changes, reason):
    path = written(tmp_path / name, moments() | changes)
    with pytest.raises(ValueError, match=reason) as raised:
        read_reference(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
@pytest.mark.parametrize("arrays", [{"samples": np.zeros(3)}, {"mu": np.zeros(POOL)}])
def test_what_holds_neither_images_nor_statistics_is_refused(tmp_path, name, arrays):
    with pytest.raises(ValueError, match=r"x\.\w+ holds neither images .arr_0. nor statistics"):
        read_reference(written(tmp_path / name, arrays))


def test_other_content_is_refused_and_nothing_is_executed(tmp_path):
    bomb = Bomb(tmp_path / "mark")
    torch.save({"mu": bomb}, tmp_path / "bomb.pt")
    torch.save({"mu": np.array([bomb], dtype=object)}, tmp_path / "array.pt")
    np.savez(tmp_path / "bomb.npz", mu=np.array([bomb], dtype=object))
    (tmp_path / "text.npz").write_text("mu")
    (tmp_path / "text.pt").write_text("mu")
    for name in ("bomb.pt", "array.pt", "bomb.npz", "text.npz", "text.pt", "absent.npz"):
        with pytest.raises(ValueError, match=name) as raised:
            read_reference(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "mark").exists()


def test_tensors_are_statistics_too(tmp_path):
    arrays = moments(0.5, 2.0)
    tensors = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    torch.save(tensors, tmp_path / "x.pt")
    _, pool, spatial = read_reference(tmp_path / "x.pt")
    assert (pool.mean.numpy() == arrays["mu"]).all() and spatial.cov.trace() == 2 * SPATIAL


@pytest.mark.parametrize(
    "content, reason",
    [
        ([1, 2], "holds neither images"),
        ({"arr_0": [1]}, "holds neither images"),
        ({"mu": [0.0] * POOL, "sigma": [[1.0], [2.0, 3.0]]}, "mu or sigma that is no array"),
        ({"mu": "zero", "sigma": {}}, "mu or sigma that is no array"),
        ({"mu": None, "sigma": torch.eye(POOL)}, r"mu \[\] and sigma \[20, 20\]"),
        (
            {"mu": torch.zeros(POOL).bfloat16(), "sigma": torch.eye(POOL)},
            "mu or sigma that is no array",
        ),
    ],
)
def test_what_is_no_statistics_is_refused_in_one_sentence(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt holds .*{reason}|x.pt {reason}") as raised:
        read_reference(tmp_path / "x.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["absent.pt", "absent.npz"])
def test_an_absent_file_is_called_so(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is not a file: give"):
        read_reference(tmp_path / name)


def test_a_reference_that_is_no_file_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="reference=.*absent.npz is not a file"):
        Inception(reference=tmp_path / "absent.npz")
