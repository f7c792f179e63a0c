"""Stitching: what fits together becomes one model, what does not is refused in one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertdiff import checkpoints
from expertdiff.bundle import Bundle, Expert
from expertdiff.cli import main
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.samplers import DDIM, DDPM, SampleNoise
from expertdiff.experts.routed import RoutedExperts


@pytest.fixture
def copy(study, tmp_path):
    """A copy of the study that a test may damage."""
    return shutil.copytree(study, tmp_path / "study")


def jobs(study):
    return [study / f"expert-{i}" for i in range(3)]


def rewrite(folder, change):
    """Edits the newest checkpoint of a job and makes it count again."""
    path = checkpoints.newest(folder / "checkpoints")
    content = checkpoints.load(path)
    change(content)
    checkpoints.save(content, path)


def refused(capsys, *args):
    """The one sentence with which the program refuses."""
    assert main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("expertdiff: error: ")
    return error


def test_routes_every_step_to_its_expert(study):
    bundle = Bundle.load(study / "bundles" / "stitched")
    experts = [Expert.read(job) for job in jobs(study)]
    x = torch.randn(6, 1, 8, 8)
    t = torch.tensor([0, 99, 100, 799, 800, 999])
    together = bundle.denoiser(x, t)
    for k, owner in enumerate([0, 0, 1, 1, 2, 2]):
        single = bundle.denoiser.experts[owner]
        alone = single(x[k : k + 1], t[k : k + 1])
        assert torch.allclose(together.eps[k], alone.eps[0], atol=1e-6)  # kernels by batch size
        weights = single.network.state_dict()
        assert all(torch.equal(weights[key], experts[owner].weights[key]) for key in weights)


@pytest.mark.parametrize("sampler", [DDIM(10), DDPM(10)])
def test_copies_of_one_network_sample_bit_equal(study, tmp_path, sampler):
    single = Bundle.load(study / "bundles" / "baseline")
    thrice = Bundle.stitch([study / "baseline"], tmp_path / "b", Partition([0, 0.1, 0.8, 1]))
    noise = SampleNoise(0, range(3), (1, 8, 8), "cpu")
    assert torch.equal(sampler(single.denoiser, noise), sampler(thrice.denoiser, noise))
    # and as three separate networks
    copies = [Bundle.load(study / "bundles" / "baseline").denoiser for _ in range(3)]
    routed = RoutedExperts(copies, thrice.partition)
    assert torch.equal(sampler(single.denoiser, noise), sampler(routed, noise))


def test_ships_the_average(study):
    content = checkpoints.load(checkpoints.newest(study / "expert-1" / "checkpoints"))
    shipped = load_file(study / "bundles" / "stitched" / "01.safetensors")
    for key, value in shipped.items():
        assert torch.equal(value, content["state_dict"][f"denoiser.network.{key}"])


def test_any_mix_of_runs(study, tmp_path, capsys):
    # A baseline fills what nobody else serves; a bundle's file and a checkpoint serve too.
    checkpoint = checkpoints.newest(study / "expert-2" / "checkpoints")
    part = study / "bundles" / "stitched" / "00.safetensors"
    arguments = ["stitch", study / "baseline", checkpoint, part, "--output", tmp_path / "mix"]
    assert main([str(a) for a in arguments]) == 0
    bundle = Bundle.load(tmp_path / "mix")
    owners = [entry["identity"]["job"] for entry in bundle.manifest["experts"]]
    assert owners == ["expert-0", "baseline", "expert-2"]
    assert str(tmp_path / "mix") in capsys.readouterr().out


def test_other_edges_filled_by_a_baseline(study, tmp_path):
    bundle = Bundle.stitch([study / "baseline"], tmp_path / "b", Partition([0, 0.5, 1]))
    assert len(bundle.manifest["experts"]) == 2
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1


class TestRefuses:
    def stitch(self, capsys, study, *extra):
        return refused(capsys, "stitch", *jobs(study), "--output", study / "new", *extra)

    def test_gap(self, study, tmp_path, capsys):
        error = refused(capsys, "stitch", *jobs(study)[::2], "--output", tmp_path / "b")
        assert "interval 1 (0.1, 0.8]" in error and "--model.expert 1" in error

    def test_the_same_interval_twice(self, study, tmp_path, capsys):
        shutil.copytree(study / "expert-1", tmp_path / "again")
        error = refused(
            capsys, "stitch", *jobs(study), tmp_path / "again", "--output", tmp_path / "b"
        )
        assert "both serve interval 1" in error and "again" in error

    def test_an_expert_without_an_interval(self, study, tmp_path, capsys):
        error = refused(
            capsys, "stitch", *jobs(study), study / "baseline", "--output", tmp_path / "b"
        )
        assert "baseline" in error and "serves no interval" in error

    def test_bad_edges(self, study, tmp_path, capsys):
        error = refused(
            capsys,
            "stitch",
            study / "baseline",
            "--edges=[0,0.7,0.5,1]",
            "--output",
            tmp_path / "b",
        )
        assert "do not partition (0, 1]" in error

    def test_missing_run(self, tmp_path, capsys):
        error = refused(capsys, "stitch", tmp_path / "nowhere", "--output", tmp_path / "b")
        assert "nowhere" in error

    def test_truncated(self, copy, capsys):
        path = checkpoints.newest(copy / "expert-1" / "checkpoints")
        for old in path.parent.glob("*.ckpt"):
            old.write_bytes(old.read_bytes()[:-1000])
        with pytest.warns(UserWarning, match="bytes instead of"):
            assert "none of the 2 checkpoints" in self.stitch(capsys, copy)

    def test_flipped_bit(self, copy, capsys):
        path = checkpoints.newest(copy / "expert-1" / "checkpoints")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        error = refused(capsys, "stitch", path, "--output", copy / "new")
        assert "is damaged" in error and path.name in error

    def test_unfinished(self, copy, capsys):
        job = copy / "expert-1"
        checkpoints.remove(checkpoints.newest(job / "checkpoints"))
        assert "step 8 of 11" in self.stitch(capsys, copy)
        arguments = ["stitch", *jobs(copy), "--output", copy / "new", "--allow_unfinished=true"]
        assert main([str(a) for a in arguments]) == 0
        assert Bundle.load(copy / "new").manifest["experts"][1]["step"] == 8

    @pytest.mark.parametrize(
        "key, path, value",
        [
            ("network", ("init_args", "model_channels"), 16),
            ("process", ("init_args", "betas", "class_path"), "expertdiff.diffusion.LinearBetas"),
            ("process", ("init_args", "T"), 1001),
            ("prediction", ("class_path",), "expertdiff.diffusion.denoiser.V"),
            ("data", ("digest",), "0" * 64),
            ("data", ("scale",), "[0, 1]"),
        ],
    )
    def test_experts_that_differ(self, copy, capsys, key, path, value):
        def change(content):
            place = content[checkpoints.IDENTITY][key]
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value

        rewrite(copy / "expert-1", change)
        error = self.stitch(capsys, copy)
        assert f"{key}." in error and str(value) in error
        assert "expert-0" in error and "expert-1" in error

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, copy, capsys, bad):
        def change(content):
            content["state_dict"]["denoiser.network.out.0.weight"][0] = bad

        rewrite(copy / "expert-1", change)
        error = self.stitch(capsys, copy)
        assert "out.0.weight holds NaN or infinity" in error and "expert-1" in error

    def test_weights_of_another_type(self, copy, capsys):
        def change(content):
            key = "denoiser.network.out.0.weight"
            content["state_dict"][key] = content["state_dict"][key].half()

        rewrite(copy / "expert-1", change)
        assert "torch.float16" in self.stitch(capsys, copy)

    def test_a_folder_of_something_else(self, study, tmp_path, capsys):
        (tmp_path / "thesis.txt").write_text("do not lose me")
        error = refused(capsys, "stitch", *jobs(study), "--output", tmp_path)
        assert "holds something else than a bundle" in error
        assert (tmp_path / "thesis.txt").read_text() == "do not lose me"


class TestLoadRefuses:
    @pytest.fixture
    def bundle(self, copy):
        return copy / "bundles" / "stitched"

    def load(self, capsys, bundle):
        return refused(capsys, "sample", bundle, "--samples=1")

    def test_no_bundle(self, tmp_path, capsys):
        assert "is not a bundle" in self.load(capsys, tmp_path)

    def test_pickles(self, bundle, capsys):
        class Bomb:
            def __reduce__(self):
                return (open, (str(bundle / "exploded"), "w"))

        torch.save({"weights": Bomb()}, bundle / "01.pt")
        assert "01.pt may hold a pickle" in self.load(capsys, bundle)
        assert not (bundle / "exploded").exists()

    def test_a_pickle_that_is_called_safetensors(self, bundle, capsys):
        class Bomb:
            def __reduce__(self):
                return (open, (str(bundle / "exploded"), "w"))

        path = bundle / "01.safetensors"
        torch.save({"weights": Bomb()}, path)
        manifest = json.loads((bundle / "manifest.json").read_text())
        from expertdiff.files import sha256_of

        manifest["experts"][1]["sha256"] = sha256_of(path)
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert "is not a safetensors file" in self.load(capsys, bundle)
        assert not (bundle / "exploded").exists()

    def test_a_checkpoint_that_holds_more_than_weights(self, copy, tmp_path, capsys):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        path = checkpoints.newest(copy / "expert-0" / "checkpoints")
        checkpoints.save({"global_step": 2, "bomb": Bomb()}, path)
        error = refused(capsys, "stitch", path, "--output", tmp_path / "b")
        assert "holds more than tensors" in error
        assert not (tmp_path / "exploded").exists()

    def test_missing_expert(self, bundle, capsys):
        (bundle / "01.safetensors").unlink()
        assert "01.safetensors is missing" in self.load(capsys, bundle)

    def test_other_weights(self, bundle, capsys):
        path = bundle / "01.safetensors"
        weights = load_file(path)
        weights["out.0.weight"] += 1
        save_file(weights, path)
        assert "01.safetensors is damaged" in self.load(capsys, bundle)

    def test_file_outside(self, bundle, capsys):
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["experts"][1]["file"] = "../baseline/00.safetensors"
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert "no safetensors file of this bundle" in self.load(capsys, bundle)

    def test_experts_in_another_order(self, bundle, capsys):
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["experts"].reverse()
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        assert "its experts are not those of its partition" in self.load(capsys, bundle)

    def test_a_manifest_without_its_keys(self, bundle, capsys):
        (bundle / "manifest.json").write_text('{"format": 1}')
        assert "manifest.json is damaged ('partition')" in self.load(capsys, bundle)

    def test_broken_manifest(self, bundle, capsys):
        (bundle / "manifest.json").write_text('{"format": 1,')
        assert "manifest.json is not valid JSON" in self.load(capsys, bundle)


def test_loading_needs_no_lightning(study):
    import subprocess
    import sys

    code = (
        "import sys; from expertdiff.bundle import Bundle; from pathlib import Path;"
        f"Bundle.load(Path({str(study / 'bundles' / 'stitched')!r}));"
        "sys.exit(any(m.split('.')[0] in ('lightning', 'wandb') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
