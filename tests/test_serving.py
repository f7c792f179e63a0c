"""Bundles in less memory: experts that take turns, and weights in int8."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from expertdiff.bundle import Bundle
from expertdiff.cli import main
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.guidance import ClassifierFree
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Heun, SampleNoise
from expertdiff.experts.remixed import RemixDiT
from expertdiff.files import read_json, sha256_of, write_json
from expertdiff.int8 import SCALE, quantized
from expertdiff.networks.dit import DiT
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.networks.unet import ADMUNet

EDGES = [0, 0.1, 0.3, 0.8, 1]


def unet():
    return ADMUNet(8, 1, 8, 1, [1, 2], [4], num_head_channels=8, num_classes=3)


def dit():
    options = {"size": (1, 16, 2), "num_classes": 3, "label_dropout": 0.1, "learn_sigma": True}
    return DiT(image_size=8, in_channels=1, **options)


def remix():
    return RemixDiT(dit(), bases=2, experts=4)


def mlp():
    return MLPDenoiser(T=1000)


SHAPES = {unet: (1, 8, 8), dit: (1, 8, 8), remix: (1, 8, 8), mlp: (2,)}


def written(folder, make, files=(0, 1, 2, 3)):
    """A bundle of networks with random weights, of which intervals may share one."""
    torch.manual_seed(0)
    folder.mkdir()
    entries = []
    for lo, hi, i in zip(EDGES, EDGES[1:], files):
        path = folder / f"{i:02d}.safetensors"
        if not path.exists():
            network = make()
            for parameter in network.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            save_file(network.state_dict(), path, {"expert": str(i)})
        entry = {"interval": [lo, hi], "file": path.name, "sha256": sha256_of(path), "step": 1}
        entries.append(entry | {"identity": {"interval": [0, 1], "job": f"expert-{i}"}})
    shape = SHAPES[make]
    scale = "[-1, 1] = uint8 / 127.5 - 1" if len(shape) == 3 else {"centre": [0, 0], "unit": 1}
    shared = {
        "process": describe(DiscreteVP(CosineBetas())),
        "prediction": describe(Eps()),
        "network": describe(make()),
        "data": {"shape": list(shape), "scale": scale},
    }
    manifest = {"format": 1, "partition": EDGES, "shared": shared, "experts": entries}
    write_json(folder / "manifest.json", manifest)
    return folder


def drawn(bundle, sampler, guidance=None):
    """Samples of two batches and two seeds, in turn."""
    denoiser = guidance(bundle.denoiser) if guidance else bundle.denoiser
    y = None if bundle.num_classes is None else torch.arange(4) % bundle.num_classes
    noises = [SampleNoise(seed, range(4), bundle.shape, "cpu") for seed in (0, 1)]
    with torch.inference_mode():  # as Lightning does
        return torch.stack([sampler(denoiser, noise, y) for noise in noises])


# Experts that take turns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, sampler",
    [
        (unet, DDIM(7, clip=False)),
        (unet, Heun(6)),
        (mlp, DDPM(7, clip=False)),
        (dit, DDPM(7)),
        (remix, DPMSolverPP2M(5)),
    ],
)
def test_samples_are_those_of_all_in_memory(tmp_path, make, sampler):
    folder = written(tmp_path / "b", make)
    expected = drawn(Bundle.load(folder), sampler)
    assert not torch.equal(*expected)
    assert torch.equal(drawn(Bundle.load(folder, lazy=True), sampler), expected)


@pytest.mark.parametrize("files", [(0, 0, 1, 1), (0, 1, 0, 2), (0, 1, 1, 0), (0, 0, 0, 0)])
def test_intervals_may_share_an_expert(tmp_path, files):
    folder = written(tmp_path / "b", mlp, files)
    ours, theirs = Bundle.load(folder), Bundle.load(folder, lazy=True)
    sampler = DDIM(9, clip=False)
    assert torch.equal(drawn(theirs, sampler), drawn(ours, sampler))
    assert theirs.denoiser.partition == ours.denoiser.partition


def test_any_t_in_any_order(tmp_path):
    folder = written(tmp_path / "b", dit)
    ours = ClassifierFree(2.0)(Bundle.load(folder).denoiser)
    theirs = ClassifierFree(2.0)(Bundle.load(folder, lazy=True).denoiser)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        for t in ([999, 5, 400, 99, 100, 799], [0] * 6, [850] * 6, [250, 50, 250, 50, 250, 50]):
            a, b = (model(x, torch.tensor(t), y) for model in (ours, theirs))
            assert torch.equal(a.eps, b.eps) and torch.equal(a.x0, b.x0)
            assert torch.equal(a.variance, b.variance)


def test_one_expert_is_in_memory_and_the_next_one_down_the_chain_is_coming(tmp_path):
    bundle = Bundle.load(written(tmp_path / "b", mlp), lazy=True)
    one = sum(p.numel() for p in mlp().parameters())
    assert sum(p.numel() for p in bundle.denoiser.parameters()) == one
    slot, taken = bundle.denoiser.experts[0].slot, []
    name, future = slot._coming
    assert name == "02.safetensors" and future.result()  # since it was loaded
    read, slot.read = slot.read, lambda name, memory: taken.append(name) or read(name, memory)
    places = {key: value.data_ptr() for key, value in future.result().items()}
    for _ in range(2):
        for t in (950, 900, 500, 200, 150, 50):
            bundle.denoiser(torch.zeros(2, 2), torch.full((2,), t))
            name, future = slot._coming
            assert {key: value.data_ptr() for key, value in future.result().items()} == places
    # never one too many, and from the cleanest on the noisiest again
    assert taken == [f"{i:02d}.safetensors" for i in (1, 0, 3, 2, 1, 0, 3)]


def flip(path):
    """Flips a bit of the last weight."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_file_is_refused_before_any_sample_and_on_the_way(tmp_path):
    folder = written(tmp_path / "b", mlp)
    bundle = Bundle.load(folder, lazy=True)
    flip(folder / "00.safetensors")
    x = torch.zeros(2, 2)
    bundle.denoiser(x, torch.tensor([950, 150]))
    for _ in range(2):
        with pytest.raises(ValueError, match="00.safetensors is damaged: its SHA-256"):
            bundle.denoiser(x, torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="00.safetensors is damaged: its SHA-256"):
        Bundle.load(folder, lazy=True)
    flip(folder / "00.safetensors")  # written anew, but as it was
    assert bundle.denoiser(x, torch.tensor([5, 5])).eps.isfinite().all()
    (folder / "01.safetensors").unlink()
    bundle.denoiser(x, torch.tensor([950, 950]))
    with pytest.raises(ValueError, match="01.safetensors is missing"):
        bundle.denoiser(x, torch.tensor([150, 950]))


def test_the_command_line_draws_the_same(study, tmp_path):
    folder, drawn = study / "bundles" / "stitched", []
    for lazy in ("true", "false"):
        output = tmp_path / lazy
        options = [f"--output={output}", "--samples=3", "--batch_size=2", f"--lazy={lazy}"]
        assert main(["sample", str(folder), *options]) == 0
        drawn.append(np.load(output / "samples.npz")["arr_0"])
    assert drawn[0].shape == (3, 8, 8, 1) and (drawn[0] == drawn[1]).all()


def test_a_bundle_is_drawn_from_in_the_precision_of_its_training(study, tmp_path):
    folder = shutil.copytree(study / "bundles" / "stitched", tmp_path / "b")
    manifest = read_json(folder / "manifest.json")
    for entry in manifest["experts"]:
        entry["identity"]["precision"] = "bf16-mixed"
    write_json(folder / "manifest.json", manifest)
    drawn = []
    for name in ("own", "bf16-mixed", "32-true"):
        options = [] if name == "own" else [f"--precision={name}"]
        output = tmp_path / name
        assert main(["sample", str(folder), "--samples=4", f"--output={output}", *options]) == 0
        drawn.append(np.load(output / "samples.npz")["arr_0"])
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


# Weights in int8 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", SHAPES)
def test_no_weight_is_off_by_more_than_half_a_level(tmp_path, make):
    folder = written(tmp_path / "b", make)
    before = load_file(folder / "01.safetensors")
    Bundle.quantize(folder, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "01.safetensors")
    bundle = Bundle.load(tmp_path / "q")
    after = bundle.denoiser.experts[1].network.state_dict()
    assert bundle.weights == "int8" and before.keys() == after.keys()
    rounded = {name.removesuffix(SCALE) for name in stored.keys() - before.keys()}
    for name, w in before.items():
        if name not in rounded:
            assert torch.equal(after[name], w)
            continue
        q, s = stored[name], stored[name + SCALE]
        assert q.dtype == torch.int8 and s.dtype == torch.float32
        inner = tuple(i for i, n in enumerate(s.shape) if n == 1)
        assert torch.equal(q.abs().amax(inner), torch.full_like(q.amax(inner), 127))
        assert ((after[name] - w).abs() <= s * (0.5 + 1e-4)).all()
        assert not torch.equal(after[name], w)
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    network = bundle.denoiser.experts[1].network
    assert rounded == {
        f"{path}.weight" for path, layer in network.named_modules() if isinstance(layer, layers)
    }


def test_a_channel_of_zeros_stays_one():
    layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Embedding(4, 5))
    layer[0].weight.data[1] = 0
    found = quantized(layer, layer.state_dict())
    assert found["0.weight.scale"].shape == (3, 1, 1, 1) and found["0.weight.scale"][1] == 0
    assert (found["0.weight"][1] == 0).all() and found["0.weight"].abs().amax() == 127
    assert torch.equal(found["1.weight"], layer[1].weight)


@pytest.mark.parametrize(
    "network",
    [
        lambda: ADMUNet(32, 3, 64, 1, [1, 2], [16], num_classes=10),
        lambda: DiT(size=(2, 256, 4), num_classes=10),
    ],
)
def test_files_are_a_quarter(tmp_path, network):
    net = network()
    save_file(net.state_dict(), tmp_path / "whole")
    save_file(quantized(net, net.state_dict()), tmp_path / "rounded")
    whole, rounded = ((tmp_path / name).stat().st_size for name in ("whole", "rounded"))
    assert 3.5 <= whole / rounded < 4


def test_every_verb_takes_rounded_weights_but_those_that_make_others(study, tmp_path, capsys):
    folder, small = study / "bundles" / "stitched", tmp_path / "small"
    assert main(["quantize", str(folder), f"--output={small}"]) == 0
    assert "MB in int8" in capsys.readouterr().out
    manifest, origin = read_json(small / "manifest.json"), sha256_of(folder / "manifest.json")
    assert manifest["quantized_from"] == {"path": str(folder), "manifest_sha256": origin}

    ours, whole = Bundle.load(small), Bundle.load(folder)
    noise = SampleNoise(0, range(3), (1, 8, 8), "cpu")
    a, b, c = (DDIM(6)(x.denoiser, noise) for x in (ours, Bundle.load(small, lazy=True), whole))
    assert torch.equal(a, b)
    assert 0 < (a - c).norm() / c.norm() < 0.1

    config = ["--config", str(folder / "config.yaml"), f"--model.bundle={small}"]
    assert main(["test", *config, f"--model.output={tmp_path / 'test'}", "--model.lazy=true"]) == 0
    assert read_json(tmp_path / "test" / "metrics.json")["weights"] == "int8"
    assert main(["consistency", str(small), f"--b={folder}", "--samples=4"]) == 0

    def refused(*args):
        assert main([str(arg) for arg in args]) == 2
        return capsys.readouterr().err

    capsys.readouterr()
    part = small / "00.safetensors"
    error = refused("stitch", part, "--output", tmp_path / "mix", "--edges=[0,1]")
    assert "00.safetensors holds rounded weights, from which nothing is made: take" in error
    assert str(folder) in error
    assert "is rounded already" in refused("quantize", small, "--output", tmp_path / "again")
    error = refused("quantize", folder, "--output", folder / ".." / "stitched")
    assert "would take the place of its source" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    error = refused("quantize", folder, "--output", tmp_path / "full")
    assert "holds something else than a bundle" in error
    flip(small / "01.safetensors")
    assert "01.safetensors is damaged" in refused("sample", small, "--samples=1")
