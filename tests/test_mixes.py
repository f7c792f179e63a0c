"""Any mix of runs, experts and steps, scored without sampling anything twice."""

import json

import pytest
import torch
from conftest import TINY

from expertdiff.analysis.mixes import Mixer, Walk
from expertdiff.bundle import Bundle
from expertdiff.data.images import Digits
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.samplers import DDIM, DPMSolverPP2M, Heun, SampleNoise
from expertdiff.evaluation.features import Pixels
from expertdiff.expert_cli import ConfigOnly
from expertdiff.image_files import to_uint8
from expertdiff.methods.stitched import Evaluation


@pytest.fixture(scope="module")
def cli():
    return ConfigOnly(TINY)


@pytest.fixture
def mixer(cli, tmp_path):
    def make(sampler=None, samples=12):
        evaluation = Evaluation(
            sampler or DDIM(8), cli.study.evaluation.judge, samples, (0, 1), batch_size=5
        )
        return Mixer(
            Partition([0, 0.1, 0.8, 1]), evaluation, cli.datamodule, tmp_path / "scores.json"
        )

    return make


def mixes_of(study):
    experts, baseline = [study / f"expert-{i}" for i in range(3)], study / "baseline"
    return {
        "experts": experts,
        "baseline": [baseline] * 3,
        "A only": [baseline, baseline, experts[2]],
        "C only": [experts[0], baseline, baseline],
    }


SAMPLERS = [DDIM(8), DDIM(8, eta=1.0), DPMSolverPP2M(8, restart=True), Heun(8)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_the_stitched_bundle(study, tmp_path, mixer, sampler):
    ours = mixer(sampler)
    mixes = mixes_of(study)
    for mix in mixes.values():
        ours._key(mix)
    walk = Walk(ours, ours._denoisers(mixes), 3, [4, 0, 7])
    found = dict(walk.samples(mixes))
    for name, mix in mixes.items():
        bundle = Bundle.stitch(dict.fromkeys(mix), tmp_path / name, ours.partition)
        noise = SampleNoise(3, [4, 0, 7], (1, 8, 8), "cpu")
        assert torch.equal(found[name], to_uint8(sampler(bundle.denoiser, noise)))


@pytest.mark.parametrize("sampler", [DDIM(38), DPMSolverPP2M(10, restart=True), Heun(9)])
def test_edges_between_any_steps(study, tmp_path, mixer, sampler):
    """One interval holds no step, and one edge lies where a float32 t would be the neighbour's."""
    ours, paths = mixer(sampler), [study / "baseline", study / "baseline", study / "expert-2"]
    ours.partition = Partition([0, 0.46, 0.461, 0.8, 1])
    mix = {"mix": [paths[0], paths[1], paths[0], paths[2]]}
    ours._key(mix["mix"])
    ((_, found),) = Walk(ours, ours._denoisers(mix), 3, [1, 2]).samples(mix)
    bundle = Bundle.stitch(dict.fromkeys(mix["mix"]), tmp_path / "b", ours.partition)
    noise = SampleNoise(3, [1, 2], (1, 8, 8), "cpu")
    assert torch.equal(found, to_uint8(sampler(bundle.denoiser, noise)))


def test_what_is_shared_is_sampled_once(study, mixer, monkeypatch):
    ours, mixes = mixer(DDIM(50)), mixes_of(study)
    for mix in mixes.values():
        ours._key(mix)
    denoisers = ours._denoisers(mixes)
    calls = dict.fromkeys(denoisers, 0)

    def counted(path):
        def forward(*inputs):
            calls[path] += 1
            return type(denoisers[path]).forward(denoisers[path], *inputs)

        return forward

    for path, denoiser in denoisers.items():
        monkeypatch.setattr(denoiser, "forward", counted(path))
    Walk(ours, denoisers, 0, [0]).samples(mixes)
    # 10 + 35 + 5 calls a chain. The baseline: one whole chain, then below A, but not below B.
    steps = {path.name: n for path, n in calls.items()}
    assert steps == {"expert-0": 5 + 5, "expert-1": 35, "expert-2": 10, "baseline": 50 + 40}


def test_scores_are_kept(study, mixer, monkeypatch):
    mixes = mixes_of(study)
    first = mixer().score(mixes)
    assert list(first) == list(mixes) and all(len(s["FD-pixels"]) == 2 for s in first.values())
    monkeypatch.setattr(Mixer, "_measured", lambda *_: pytest.fail("measured again"))
    assert mixer().score(mixes) == first
    with pytest.raises(pytest.fail.Exception):
        mixer(samples=13).score(mixes)
    # A fresh start gives the same numbers.
    monkeypatch.undo()
    ours = mixer()
    ours.scores.write_text(json.dumps({}))
    assert ours.score({"a": mixes["A only"]})["a"] == first["A only"]


def test_scores_depend_on_the_reference_that_is_used(mixer, monkeypatch):
    def protocol(**changes):
        ours = mixer()
        ours.data = Digits(**changes)
        return ours

    own, other, swapped = protocol(), protocol(reference="train"), protocol()
    images, labels = swapped.data.split("validation")
    swapped.data._splits["validation"] = (images.flip(0), labels)
    assert own.data.identity() == swapped.data.identity()
    assert len({str(ours._protocol) for ours in (own, other, swapped)}) == 3
    assert protocol()._protocol == own._protocol
    # Of a judge with a file of its own, the data's items do not count.
    files = []
    for name in ("a", "b"):
        monkeypatch.setattr(Pixels, "own_reference", name)
        files += [protocol()._protocol, protocol(reference="train")._protocol]
    assert files[0] == files[1] != files[2] == files[3]


def test_refusals(study, mixer):
    experts = mixes_of(study)["experts"]
    with pytest.raises(ValueError, match="2 experts cannot serve the 3 intervals"):
        mixer().score({"short": experts[:2]})
    with pytest.raises(ValueError, match=r"trained on \(0.8, 1\], it cannot serve \(0, 0.1\]"):
        mixer().score({"turned": experts[::-1]})
