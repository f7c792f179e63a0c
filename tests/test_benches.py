"""Benches are run by hand; here, that they can still be: each is read, and one step is made."""

import importlib.util
from functools import partial

import pytest
import torch
from conftest import ROOT

from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.methods.single import Diffusion
from expertdiff.networks.mlp import MLPDenoiser

FOLDER = ROOT / "tests" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)

    def read(name):
        # Under another name: tests have a module `cluster`, too.
        spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return read


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_what_a_bench_imports_is_there(bench, name):
    bench(name)


def test_a_step_of_fit_runs_without_its_loop(bench):
    module = Diffusion(
        network=MLPDenoiser(8, 1, T=1000),
        process=DiscreteVP(CosineBetas()),
        prediction=Eps(),
        timesteps=Uniform(),
        weighting=Simple(),
        partition=Partition([0, 1]),
    )
    before = [p.clone() for p in module.parameters()]
    index = torch.arange(4)
    make = partial(torch.optim.AdamW, lr=0.1)
    step = bench("ours").fit_step(module, make, Batch(torch.randn(4, 2), index, index))
    step()
    step()
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before))
