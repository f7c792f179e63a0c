"""Which t are drawn when, and what their losses count: CLTS, low discrepancy, ANT-UW, MDLRC."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare, kstest, truncnorm
from test_training import SignalAt, assert_equal, weights

from expertdiff import checkpoints
from expertdiff.callbacks.momentum import MDLRC
from expertdiff.cli import main
from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import X0, Eps, Prediction, V
from expertdiff.diffusion.objective import losses
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import VPSDE, CosineBetas, DiscreteVP
from expertdiff.diffusion.timesteps import CLTS, LossSecondMoment, LowDiscrepancy, Step, Uniform
from expertdiff.diffusion.weighting import MinSNR, Simple
from expertdiff.methods.base import Method
from expertdiff.methods.single import Diffusion
from expertdiff.methods.uncertainty import Uncertainty
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.seeds import generator

CHAIN = DiscreteVP(CosineBetas())
INTERVALS = [Interval(), Interval(0.1, 0.8), Interval(0.8, 1)]


def draw(sampler, n, interval, process=CHAIN, key=0, **step):
    g, shared = generator("cpu", "t", key), generator("cpu", "shared", key)
    return sampler.sample(n, interval, g, process, Step(shared, **step))


def method(cls, **replaced):
    parts = {"timesteps": Uniform(), "partition": Partition([0, 0.1, 0.8, 1])} | replaced
    network = MLPDenoiser(width=4, depth=1, T=1000)
    return cls(network=network, process=CHAIN, prediction=Eps(), weighting=Simple(), **parts)


def drawn(module, monkeypatch, n, rank=0, batch_idx=0, accumulate=1):
    """The t of a micro-batch of n points, of a run on two devices."""
    counts = {"accumulate_grad_batches": accumulate, "world_size": 2, "max_steps": 9}
    monkeypatch.setattr(Method, "trainer", SimpleNamespace(global_step=3, **counts))
    monkeypatch.setattr(Method, "global_rank", rank)
    batch = Batch(torch.zeros(n, 2), torch.zeros(n).long(), torch.arange(n))
    return module.training_step(batch, batch_idx)["t"]


def truth(g, interval, mu=0.3, s=0.25, T=1000):
    """p of each timestep of an interval, by the textbook."""
    u = (torch.arange(T, dtype=torch.float64) + 1) / T
    q = torch.exp(-((u - mu) ** 2) / (2 * s**2))
    p = ((1 - g) / T + g * q / q.sum())[interval.steps(T).start : interval.steps(T).stop]
    return p / p.sum()


class TestCLTS:
    @pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("interval", INTERVALS, ids=str)
    def test_t_follows_p(self, g, interval):
        t, weight = draw(CLTS(), 20_000, interval, run=g)
        p, first = truth(g, interval), interval.steps(1000).start
        seen = (t - first).bincount(minlength=len(p)).reshape(-1, 20).sum(1)
        expected = 20_000 * p.reshape(-1, 20).sum(1)
        assert chisquare(seen.numpy(), expected.numpy()).pvalue > 1e-3
        assert (weight == 1).all() and t.dtype == torch.int64
        if g == 1:  # and the test can tell
            flat = torch.full_like(expected, 20_000 / len(expected))
            assert chisquare(seen.numpy(), flat.numpy()).pvalue < 1e-9

    def test_in_continuous_time(self):
        t, _ = draw(CLTS(), 20_000, Interval(0.1, 0.8), VPSDE(), run=1.0)
        cut = truncnorm((0.1 - 0.3) / 0.25, (0.8 - 0.3) / 0.25, 0.3, 0.25)
        assert kstest(t.numpy(), cut.cdf).pvalue > 1e-3
        assert (t > 0.1).all() and (t <= 0.8).all()

    def test_far_from_mu_q_is_too_small_for_a_number(self):
        p = CLTS(s=0.01).probabilities(1.0, Interval(0.8, 1), CHAIN, torch.device("cpu"))
        assert p.sum().item() == pytest.approx(1) and (p.diff() <= 0).all()
        # exp of the difference of two adjacent exponents
        assert (p[1] / p[0]).item() == pytest.approx(math.exp(-(0.502**2 - 0.501**2) / 2e-4))

    @pytest.mark.parametrize("sampler, run", [(CLTS(g_end=0.0), 0.7), (CLTS(), 0.0)])
    def test_without_g_it_is_uniform_bit_for_bit(self, sampler, run):
        ours = draw(sampler, 500, INTERVALS[1], run=run)
        for mine, theirs in zip(ours, draw(Uniform(), 500, INTERVALS[1])):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("interval", INTERVALS, ids=str)
    def test_the_control_has_the_same_expectation(self, interval):
        t, weight = draw(CLTS(as_weight=True), 50_000, interval, run=0.7)
        p, first = truth(0.7, interval), interval.steps(1000).start
        exact = len(p) * p[t - first]
        assert torch.allclose(weight.double(), exact, rtol=1e-6)
        t = (t - first).bincount(minlength=len(p)).reshape(-1, 20).sum(1)
        assert chisquare(t.numpy()).pvalue > 1e-3  # all alike

    def test_refusals(self):
        for arguments in ({"mu": 2}, {"s": 0}, {"g_end": 1.5}):
            with pytest.raises(ValueError, match="must be in"):
                CLTS(**arguments)


class TestLowDiscrepancy:
    @pytest.mark.parametrize("interval", INTERVALS, ids=str)
    @pytest.mark.parametrize("process", [CHAIN, VPSDE()], ids=["chain", "sde"])
    def test_a_step_has_one_t_in_each_part_of_the_interval(self, process, interval):
        parts = [
            draw(LowDiscrepancy(), 5, interval, process, part=part, parts=4)[0] for part in range(4)
        ]
        progress = process.progress(torch.cat(parts)).sort().values
        place = (progress - interval.lo) / (interval.hi - interval.lo) * 20
        edge = 20 / (interval.hi - interval.lo) / 1000 if process is CHAIN else 1e-3
        gaps = place.diff()
        assert ((gaps - 1).abs() <= edge + 1e-9).all()
        assert (progress > interval.lo).all() and (progress <= interval.hi).all()
        # each part alone is as even
        alone = process.progress(parts[2]).sort().values.diff()
        assert (alone - alone.mean()).abs().max() <= 0.002

    def test_each_t_is_uniform_and_the_loss_varies_less(self):
        u = torch.linspace(0, 1, 1000, dtype=torch.float64)
        loss = 1 / (0.05 + u) + torch.sin(9 * u)  # large at the clean end

        def means(sampler):
            t = torch.stack([draw(sampler, 16, Interval(), key=key)[0] for key in range(2000)])
            return t, loss[t].mean(1)

        t, low = means(LowDiscrepancy())
        _, plain = means(Uniform())
        for item in (0, 7):
            assert chisquare((t[:, item] // 50).bincount(minlength=20).numpy()).pvalue > 1e-3
        for each in (low, plain):  # unbiased, both
            assert abs(each.mean() - loss.mean()) < 4 * each.std() / math.sqrt(len(each))
        assert low.var() < plain.var() / 4

    def test_ranks_and_micro_batches_share_one_step(self, monkeypatch):
        module = method(Diffusion, timesteps=LowDiscrepancy())
        parts = [(rank, batch_idx) for rank in (0, 1) for batch_idx in (6, 7)]
        t = torch.cat([drawn(module, monkeypatch, 8, *part, accumulate=2) for part in parts])
        gaps = t.sort().values.diff()
        assert ((gaps == 31) | (gaps == 32)).all() and len(t) == 32  # 1000 / 32 = 31.25


@pytest.mark.parametrize("process", [CHAIN, VPSDE()], ids=["chain", "sde"])
def test_min_snr_is_one_loss_for_all_predictions(process):
    t = torch.tensor([20, 300, 700, 900]) if process is CHAIN else torch.tensor([0.1, 0.3, 0.6, 1])
    snr = process.snr(t)
    formulas = {Eps(): snr.clamp(max=5) / snr, V(): snr.clamp(max=5) / (snr + 1)}
    formulas[X0()] = snr.clamp(max=5)
    g = generator("cpu", "min-snr")
    x0, eps, wrong = torch.randn(3, 4, 1, 4, 4, generator=g, dtype=torch.float64).unbind()
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in process.alpha_sigma(t))
    # the same wrong x0, whatever the network's output means
    prediction = Prediction(x0 + wrong, eps - alpha / sigma * wrong)
    weighted = []
    for kind, expected in formulas.items():
        weight = MinSNR()(process, t, kind)
        assert torch.allclose(weight, expected, rtol=1e-9)
        weighted.append(weight * losses(prediction, kind, process, x0, eps, t).mse)
    on_x0 = snr.clamp(max=5) * wrong.square().mean((1, 2, 3))
    for each in weighted:
        assert torch.allclose(each, on_x0, rtol=1e-4)


def test_min_snr_without_signal_is_one():
    process = SimpleNamespace(snr=lambda t: torch.tensor([0.0, 2.0], dtype=torch.float64))
    for kind in (Eps(), V(), X0()):
        weight = MinSNR()(process, torch.tensor([0, 1]), kind)
        assert weight[0] == 1 and weight.isfinite().all()
    with pytest.raises(ValueError, match="must be positive"):
        MinSNR(0)


class TestUncertainty:
    def test_the_best_u_is_the_logarithm_of_the_loss(self):
        module = method(Uncertainty)
        losses_ = torch.tensor([0.6, 0.08, 0.0025])
        each = losses_.repeat_interleave(torch.tensor([4, 3, 3]))[None]  # 10 items, 3 intervals
        group = module.parameter_groups()[-1]
        assert group["params"] == [module.u] and (module.u == 0).all()
        assert group["lr"] == 0.025 and group["weight_decay"] == 0
        optimizer = torch.optim.AdamW([group], lr=1.0, weight_decay=1.0)
        for _ in range(800):
            optimizer.zero_grad()
            module.averaged(each).sum().backward()
            optimizer.step()
        assert torch.allclose(module.u[0], losses_.log(), atol=0.02)

    def test_the_loss_is_that_of_the_paper(self):
        module = method(Uncertainty, fixed=[0.5, 0.25, 2])
        each = torch.tensor([[1.0, 3, 5, 4, 6, 10]])
        expected = (4 + math.log(0.5) + 18 + math.log(0.25) + 4 + math.log(2)) / 6
        assert module.averaged(each).item() == pytest.approx(expected)
        assert len(module.parameter_groups()) == 1 and not module.u.requires_grad

    def test_a_step_draws_alike_from_all_intervals_and_learns(self, fit, tmp_path):
        assert fit("--model=Uncertainty", "--data.batch_size=9", "--trainer.max_steps=3") == 0
        job = tmp_path / "tiny" / "uncertainty"
        content = checkpoints.load(checkpoints.newest(job / "checkpoints"))
        u = content[checkpoints.RAW]["u"].abs()
        assert ((u > 0) & (u < 0.076)).all()  # three steps of .025
        assert main(["stitch", str(job), f"--output={tmp_path / 'bundle'}"]) == 0

    def test_t_by_interval(self, monkeypatch):
        t = drawn(method(Uncertainty, timesteps=LowDiscrepancy()), monkeypatch, 9)
        owner = Partition([0, 0.1, 0.8, 1]).index(CHAIN.progress(t))
        assert owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    @pytest.mark.parametrize(
        "replaced, said",
        [
            ({"partition": Partition([0, 1])}, "has one interval"),
            ({"timesteps": LossSecondMoment()}, "draws from the whole chain"),
            ({"fixed": [1, 2]}, "for each of the 3 intervals"),
            ({"fixed": [1, 2, 0]}, "must be a positive loss"),
        ],
    )
    def test_refusals(self, replaced, said):
        with pytest.raises(ValueError, match=said):
            method(Uncertainty, **replaced)

    def test_a_batch_has_each_interval(self, fit, capsys):
        assert fit("--model=Uncertainty", "--data.batch_size=2") == 2
        assert "batches of 2 have not one t" in capsys.readouterr().err


class TestMDLRC:
    def traced(self, step, steps, **options):
        parameter = torch.nn.Parameter(torch.zeros(1))
        groups = [{"params": [parameter]}, {"params": [], "lr": 0.5}]
        optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99))
        trainer = {"optimizers": [optimizer], "lr_scheduler_configs": [], "max_steps": steps}
        trainer, callback = SimpleNamespace(**trainer), MDLRC(**options)
        callback.on_fit_start(trainer, None)
        # as a checkpoint of another step would leave it
        state = optimizer.state_dict()
        state["param_groups"][0] |= {"lr": 7.0, "betas": (0.3, 0.99)}
        optimizer.load_state_dict(state)
        trainer.global_step = step
        callback.on_train_batch_start(trainer, None, None, 0)
        return optimizer.param_groups

    @pytest.mark.parametrize("tau", [0, 0.25, 0.5, 0.75, 1])
    def test_trace(self, tau):
        step = int(8 * tau)
        beta = 0.9 * (1 - tau) / (0.1 + 0.9 * (1 - tau))
        for group, lr in zip(self.traced(step, 8), (0.1, 0.5)):
            assert group["betas"] == (pytest.approx(beta), 0.99)
            assert group["lr"] == pytest.approx(lr * 0.1 / (1 - beta))
            assert group["lr"] == pytest.approx(lr * (1 - 0.9 * tau))
        for group, lr in zip(self.traced(step, 8, momentum=False), (0.1, 0.5)):
            assert group["betas"] == (0.9, 0.99)
            assert group["lr"] == pytest.approx(lr * (1 - 0.9 * tau))

    def test_refusals(self):
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        trainer = SimpleNamespace(optimizers=[sgd], lr_scheduler_configs=[])
        with pytest.raises(ValueError, match="SGD has no betas"):
            MDLRC().on_fit_start(trainer, None)
        trainer.lr_scheduler_configs.append("a scheduler")
        with pytest.raises(ValueError, match="leave out one"):
            MDLRC().on_fit_start(trainer, None)


def test_a_paced_run_resumes_with_the_same_pace_or_not_at_all(fit, tmp_path, capsys):
    paced = ["--model.timesteps=CLTS", "--trainer.callbacks+=MDLRC", "--study.iterations=80"]
    interrupt = ["--trainer.callbacks+=test_training.SignalAt", "--trainer.callbacks.step=3"]
    interrupt.append(f"--trainer.callbacks.number={int(signal.SIGTERM)}")
    assert SignalAt.__module__ == "test_training"
    assert fit(*paced, *interrupt) == 75
    capsys.readouterr()
    assert fit(*paced, "--trainer.max_steps=12") == 2
    assert "paced_by: 12 != 8" in capsys.readouterr().err
    assert fit(paced[0], paced[2]) == 2
    assert "callbacks: None != [{" in capsys.readouterr().err
    assert fit(*paced) == 0
    assert fit(*paced, "--study.name=whole") == 0
    halves, whole = (tmp_path / name / "expert-0" for name in ("tiny", "whole"))
    assert_equal(weights(halves, 8), weights(whole, 8))
    content = checkpoints.load(checkpoints.newest(whole / "checkpoints"))
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3 * (1 - 0.9 * 7 / 8))  # of the last step, the eighth
