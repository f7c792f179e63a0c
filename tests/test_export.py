"""Experts as plain networks: what is written is what acts, and can be started from."""

import torch

from expertdiff.bundle import Bundle, Expert
from expertdiff.checkpoints import read_published
from expertdiff.cli import main
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.experts.remixed import RemixDiT
from expertdiff.files import read_json, write_json
from expertdiff.networks.dit import DiT


def test_experts_of_a_route_are_files_of_their_own(study, tmp_path):
    bundle = study / "bundles" / "stitched"
    assert main(["export", str(bundle), f"--output={tmp_path}"]) == 0
    assert read_json(tmp_path / "experts.json") == {
        "00.pt": [0, 0.1], "01.pt": [0.1, 0.8], "02.pt": [0.8, 1]
    }  # fmt: skip
    for i in range(3):
        weights = torch.load(tmp_path / f"0{i}.pt", weights_only=True)
        for key, value in Expert.read(study / f"expert-{i}").weights.items():
            assert torch.equal(weights[key], value)


def test_a_training_starts_from_an_exported_file(study, tmp_path, fit):
    assert main(["export", str(study / "bundles/baseline"), f"--output={tmp_path / 'plain'}"]) == 0
    options = ["--trainer.max_steps=1", "--model.optimizer.lr=0", "--ema.decay=0"]
    assert fit(f"--model.init_from={tmp_path / 'plain' / '00.pt'}", *options) == 0
    theirs = Expert.read(study / "baseline").weights
    for key, value in Expert.read(tmp_path / "tiny" / "expert-0").weights.items():
        assert torch.equal(value, theirs[key]), key


def test_mixed_experts_become_networks_of_their_own(tmp_path):
    torch.manual_seed(0)
    plain = DiT(image_size=8, in_channels=1, size=(1, 16, 2), num_classes=None, learn_sigma=False)
    network = RemixDiT(plain, bases=2, experts=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = bundle_of(network, tmp_path / "bundle")
    assert main(["export", str(folder), f"--output={tmp_path / 'plain'}"]) == 0
    model = Bundle.load(folder).denoiser
    assert model.partition.edges == (0, 0.25, 0.5, 0.75, 1)
    x, ends = torch.randn(1, 1, 8, 8), {}
    for name, (lo, _) in read_json(tmp_path / "plain" / "experts.json").items():
        plain.load_state_dict(read_published(tmp_path / "plain" / name))
        t = torch.tensor([round(1000 * lo) + 3])
        torch.testing.assert_close(plain.eval()(x, t), model.network(x, t), rtol=1e-5, atol=1e-6)
        ends[name] = lo
    assert list(ends.values()) == [0, 0.25, 0.5, 0.75]


def bundle_of(network, folder):
    """A bundle of one network that was never trained."""
    from safetensors.torch import save_file

    from expertdiff.files import sha256_of

    folder.mkdir()
    save_file(network.state_dict(), folder / "00.safetensors")
    identity = {
        "process": describe(DiscreteVP(LinearBetas())), "prediction": describe(Eps()),
        "network": describe(network), "data": {"shape": [1, 8, 8], "scale": ""}, "interval": [0, 1],
    }  # fmt: skip
    entry = {"file": "00.safetensors", "sha256": sha256_of(folder / "00.safetensors")}
    entry |= {"interval": [0, 1], "step": 1, "identity": identity}
    shared = {key: identity[key] for key in ("process", "prediction", "network", "data")}
    manifest = {"format": 1, "partition": [0, 1], "shared": shared, "experts": [entry]}
    write_json(folder / "manifest.json", manifest)
    return folder
