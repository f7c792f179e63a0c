"""Numbers of files, and of a bundle against a file, from the front door to the JSON."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn

from expertdiff.cli import main, run_verb
from expertdiff.data.images import Digits
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import X0
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM
from expertdiff.evaluation import inception as module
from expertdiff.evaluation.features import FeatureExtractor, Pixels
from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.evaluation.inception import COMPARABLE, Inception
from expertdiff.files import sha256_of, write_json
from expertdiff.image_files import load_npz, save_npz
from expertdiff.measure import measure
from expertdiff.methods.stitched import Evaluation, Stitched
from expertdiff.networks.network import Network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the covariance is singular"),
    pytest.mark.filterwarnings("ignore:left out"),
]


class Sines(Inception):
    """Smooth functions of the pixels in the place of the network."""

    _loaded = (SimpleNamespace(fc=SimpleNamespace(weight=torch.zeros(7, 2048))), "none")

    def extract(self, images):
        means = images.flatten(1).float().mean(1, keepdim=True) / 255
        return (means * torch.arange(1, 2048 + 2023 + 1)).sin()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")


def images(n, size=8, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def files(folder, **sets):
    for name, x in sets.items():
        save_npz(x, folder / f"{name}.npz")
    return [folder / f"{name}.npz" for name in sets]


def test_verb_prints_and_writes_the_distance_of_two_files(tmp_path, capsys):
    x, y = images(40), images(30, seed=1)
    drawn, real = files(tmp_path, drawn=x, real=y)
    run_verb(measure, [str(drawn), f"--reference={real}", "--judge=Pixels"])
    result = json.loads((tmp_path / "drawn.json").read_text())
    expected = frechet_distance(*(Statistics.of(Pixels()(z)) for z in (x, y)))
    assert result["distances"] == {"FD-pixels": pytest.approx(expected, rel=1e-9)}
    assert result["metric"] == "FD-pixels" and result["extractor"] == Pixels().identity
    assert result["samples"] == 40 and result["reference_samples"] == 30
    assert result["file"].startswith("drawn.npz, sha256 ")
    assert result["reference"] == f"real.npz, sha256 {sha256_of(real)[:12]}"
    out = capsys.readouterr().out
    assert f"FD-pixels{expected:>13.5g}" in out and "drawn.json" in out


def test_every_number_of_inception_is_told(tmp_path, capsys):
    drawn, real = files(tmp_path, drawn=images(20), real=images(25, seed=1))
    measure(drawn, real, Sines(), tmp_path / "deep" / "numbers.json")
    distances = json.loads((tmp_path / "deep" / "numbers.json").read_text())["distances"]
    assert list(distances) == ["FID", "sFID", "KID", "precision", "recall"]
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in distances)
    assert "20 images of" in out and "(25 items)" in out


def test_statistics_are_measured_against_and_tell_what_they_can(tmp_path, capsys):
    (drawn,) = files(tmp_path, drawn=images(20))
    features = Sines()(load_npz(drawn)[0])[:, :2048].double().numpy()
    np.savez(tmp_path / "edm.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    measure(drawn, tmp_path / "edm.npz", Sines())
    result = json.loads((tmp_path / "drawn.json").read_text())
    assert result["distances"] == {"FID": pytest.approx(0, abs=1e-6)}
    assert result["reference_samples"] is None and "(statistics)" in capsys.readouterr().out


def test_a_second_reference_is_refused(tmp_path):
    drawn, real = files(tmp_path, drawn=images(9), real=images(9, seed=1))
    with pytest.raises(ValueError, match=r"judge.reference real.npz.* leave judge.reference out"):
        measure(drawn, real, Sines(reference=real))
    assert not (tmp_path / "drawn.json").exists()


@pytest.mark.parametrize("judge", [Pixels(), Sines()])
def test_files_of_two_resolutions_are_refused(tmp_path, judge):
    drawn, real = files(tmp_path, drawn=images(9), real=images(9, size=16))
    with pytest.raises(ValueError, match=r"real.npz .*\[3, 16, 16\].*samples are \[3, 8, 8\]"):
        measure(drawn, real, judge)
    assert not (tmp_path / "drawn.json").exists()


class Grey(Network):
    """Predicts grey."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, y=None):
        return self.w * x_t


def bundle(folder):
    """One expert for the whole chain of the digits' shape."""
    network = Grey()
    folder.mkdir()
    save_file(network.state_dict(), folder / "00.safetensors")
    identity = {"interval": [0, 1], "job": "baseline", "ema": {"decay": 0.9}}
    expert = {
        "interval": [0, 1],
        "file": "00.safetensors",
        "sha256": sha256_of(folder / "00.safetensors"),
        "step": 1,
        "identity": identity,
    }
    shared = {
        "process": describe(DiscreteVP(CosineBetas())),
        "prediction": describe(X0()),
        "network": describe(network),
        "data": {"shape": [1, 8, 8], "scale": "[-1, 1] = uint8 / 127.5 - 1"},
    }
    manifest = {"format": 1, "partition": [0, 1], "shared": shared, "experts": [expert]}
    write_json(folder / "manifest.json", manifest)
    return folder


def result_of(folder, judge):
    """The result of a test of 12 samples of a bundle of digits."""
    evaluation = Evaluation(DDIM(2), judge, samples=12, seeds=(0, 1), batch_size=5)
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=1, enable_progress_bar=False, **quiet)
    trainer.test(Stitched(folder, evaluation), Digits(), verbose=False)
    return json.loads((folder / "test" / "metrics.json").read_text())


def test_a_bundle_is_tested_against_a_file(tmp_path, capsys):
    digits, folder = Digits(), bundle(tmp_path / "bundle")
    (real,) = files(tmp_path, real=digits.split("validation")[0][:100])
    result = result_of(folder, Sines(reference=real))
    assert result["reference"] == f"real.npz, sha256 {sha256_of(real)[:12]}"
    assert result["reference_samples"] == 100 and result["floor_samples"] == 12
    assert set(result["further"]) == {"sFID", "KID", "precision", "recall"}
    assert set(result["further_floors"]) == set(result["further"])
    assert result["floor"] < result["mean"] and result["further"]["recall"]["mean"] == 0
    assert "against real.npz, sha256" in capsys.readouterr().out
    # The very images of the data's own reference are another thing.
    own = result_of(folder, Sines())
    assert own["reference"] == "validation" and own["reference_samples"] == 500
    assert own["mean"] != result["mean"]


def test_a_bundle_is_tested_against_statistics(tmp_path):
    features = Sines()(Digits().split("validation")[0]).double().numpy()
    moments = {}
    for end, part in (("", features[:, :2048]), ("_s", features[:, 2048:])):
        moments |= {f"mu{end}": part.mean(0), f"sigma{end}": np.cov(part, rowvar=False)}
    np.savez(tmp_path / "adm.npz", **moments)
    folder = bundle(tmp_path / "bundle")
    result = result_of(folder, Sines(reference=tmp_path / "adm.npz"))
    own = result_of(folder, Sines())
    assert result["reference_samples"] is None and set(result["further"]) == {"sFID"}
    assert result["mean"] == pytest.approx(own["mean"], rel=1e-4)
    assert result["further"]["sFID"]["mean"] == pytest.approx(own["further"]["sFID"]["mean"], 1e-4)


def test_a_bundle_of_another_resolution_than_the_file_is_refused_before_sampling(tmp_path):
    (real,) = files(tmp_path, real=images(9, size=16, channels=1))
    with pytest.raises(ValueError, match=r"\[1, 16, 16\].*\[1, 8, 8\]"):
        result_of(bundle(tmp_path / "bundle"), Sines(reference=real))


@pytest.mark.parametrize("verb", ["measure", "test"])
def test_help_says_which_number_compares_with_whose(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert " ".join(COMPARABLE.split()) in " ".join(capsys.readouterr().out.split())


def test_judges_of_images_are_what_the_verb_takes(capsys):
    assert measure.__annotations__["judge"] is FeatureExtractor
    with pytest.raises(SystemExit):
        run_verb(measure, ["x.npz", "--reference=y.npz", "--judge=PointCloud"])
    assert "PointCloud" in capsys.readouterr().err
