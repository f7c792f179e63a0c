"""Networks that learn from a finished model, and experts merged into the network they began as."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY
from test_training import SignalAt, assert_equal, weights

from expertdiff import checkpoints
from expertdiff.analysis import merging
from expertdiff.analysis.merging import Loss, Samples, search
from expertdiff.bundle import Bundle, Expert, Merger
from expertdiff.cli import main
from expertdiff.config_verbs import plan_config
from expertdiff.data import Digits, Toy2D
from expertdiff.data.densities import Moons
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import VPSDE
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.evaluation.features import Pixels
from expertdiff.expert_cli import ConfigOnly
from expertdiff.files import sha256_of
from expertdiff.loggers import read_metrics
from expertdiff.methods.base import validation_t
from expertdiff.methods.distillation import Decoupled
from expertdiff.methods.stitched import Evaluation
from expertdiff.networks.flow import CouplingFlow, Flowed
from expertdiff.networks.mlp import MLPDenoiser

EDGES = "--model.partition.edges=[0, 0.5, 1]"


@pytest.fixture(scope="session")
def tuned(study, tmp_path_factory):
    """Folders of the first network and of two experts that were tuned from it."""
    root = tmp_path_factory.mktemp("tuned")
    for i in range(2):
        options = [EDGES, f"--model.expert={i}", f"--model.init_from={study / 'baseline'}"]
        assert main(["fit", *TINY, "--model=Decoupled", *options, f"--study.root={root}"]) == 0
    return study / "baseline", root / "tiny/expert-0", root / "tiny/expert-1"


@pytest.fixture
def merger(tuned):
    first, *experts = map(Expert.read, tuned)
    return Merger(first, experts)


class TestMerging:
    def test_shares_of_nothing_are_the_first_network(self, merger):
        for key, value in merger.weights([0, 0]).items():
            assert torch.equal(value, merger.origin.weights[key])

    def test_a_whole_share_of_one_is_that_expert(self, merger):
        for i, shares in enumerate([[1, 0], [0, 1]]):
            for key, value in merger.weights(shares).items():
                torch.testing.assert_close(value, merger.experts[i].weights[key])
        assert any(
            not torch.equal(value, merger.origin.weights[key])
            for key, value in merger.weights([1, 0]).items()
        )

    def test_the_changes_add_up(self, merger):
        first, a, b = (e.weights for e in (merger.origin, *merger.experts))
        for key, value in merger.weights([0.3, -0.5]).items():
            expected = 1.2 * first[key] + 0.3 * a[key] - 0.5 * b[key]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)

    def test_what_began_elsewhere_is_refused(self, tuned, study):
        first, expert, _ = map(Expert.read, tuned)
        with pytest.raises(ValueError, match="expert-0.* was trained from random weights, not"):
            Merger(first, [expert, Expert.read(study / "expert-0")])
        with pytest.raises(ValueError, match="from another file"):
            Merger(replace(first, sha256="0" * 64), [expert])
        with pytest.raises(ValueError, match="no expert"):
            Merger(first, [])
        part = replace(first, identity=first.identity | {"interval": [0, 0.5]})
        with pytest.raises(ValueError, match=r"acts in \(0, 0.5\], and a merged network acts"):
            Merger(part, [expert])

    def test_nothing_is_lost(self, tuned, tmp_path, capsys):
        first, *experts = map(str, tuned)
        output = tmp_path / "merged"
        arguments = ["merge", *experts, "--origin", first, "--output", str(output)]
        assert main([*arguments, "--shares=[1, 1]"]) == 0
        before = (output / "00.safetensors").read_bytes()
        assert main([*arguments, "--shares=[1, .nan]"]) == 2
        assert "must be finite" in capsys.readouterr().err
        again = ["merge", *experts, "--origin", str(output / "00.safetensors")]
        assert main([*again, "--output", str(output), "--shares=[1, 1]"]) == 2
        points = ["--data=Toy2D", "--data.density=Moons"]
        assert main([*arguments, *points]) == 2
        assert "was trained on data of shape" in capsys.readouterr().err
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine").write_text("")
        elsewhere = [*arguments[:-1], str(tmp_path / "other"), "--data=Digits"]
        assert main(elsewhere) == 2  # before any search
        assert "holds something else" in capsys.readouterr().err
        assert (output / "00.safetensors").read_bytes() == before
        assert Bundle.load(output).denoiser

    def test_a_bundle_does_not_take_the_place_of_its_source(self, tuned, tmp_path):
        Bundle.stitch([tuned[0]], tmp_path / "b")
        with pytest.raises(ValueError, match="would take the place of its source 00.safetensors"):
            Bundle.stitch([tmp_path / "b/00.safetensors"], tmp_path / "b")

    def test_the_loss_behind_a_flow_is_that_of_what_it_makes(self):
        torch.manual_seed(0)
        network = Flowed(MLPDenoiser(width=8), CouplingFlow(depth=2, width=4))
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        denoiser, data = NetworkDenoiser(network, VPSDE(), Eps()), Toy2D(Moons(), samples=300)
        x0 = data.scaled(data.split("train")[0])
        index, eps = torch.arange(300), SampleNoise(0, range(300), (2,), "cpu")(0)
        t = validation_t(denoiser.process, index, Interval())
        with torch.no_grad():
            x_t = denoiser.process.add_noise(network.flow(x0)[0], eps, t)
            expected = (denoiser(x_t, t).eps - eps).square().mean().item()
        assert Loss(data, 300)(denoiser) == pytest.approx(expected, rel=1e-5)

    def test_the_verb_writes_one_network(self, tuned, tmp_path, capsys):
        first, *experts = map(str, tuned)
        arguments = ["merge", *experts, "--origin", first, "--output", str(tmp_path / "merged")]
        assert main([*arguments, "--shares", "[0.5, 0.25]"]) == 0
        bundle = Bundle.load(tmp_path / "merged")
        (entry,) = bundle.manifest["experts"]
        assert entry["interval"] == [0, 1]
        assert [part["share"] for part in entry["identity"]["merged"]] == [0.5, 0.25]
        first, *experts = map(Expert.read, tuned)
        assert entry["step"] == first.step + sum(e.step for e in experts)
        merged = Merger(first, experts).weights([0.5, 0.25])
        assert_equal([bundle.denoiser.network.state_dict()], [merged])
        capsys.readouterr()
        assert main(arguments) == 2
        assert "give shares, or data" in capsys.readouterr().err
        assert main([*arguments, "--shares", "[1]"]) == 2
        assert "one for each of the 2 experts" in capsys.readouterr().err

    def test_it_searches_by_loss_and_by_samples(self, tuned, tmp_path):
        first, *experts = map(str, tuned)
        output, few = str(tmp_path / "merged"), ["--trials=5", "--loss_items=50"]
        arguments = ["merge", *experts, "--origin", first, "--output", output, "--data=Digits"]
        assert main([*arguments, *few]) == 0
        origin, *others = map(Expert.read, tuned)
        loss, merger = Loss(Digits(), 50), Merger(origin, others)
        found = loss(Bundle.load(tmp_path / "merged").denoiser)
        assert found <= min(loss(merger.merged(s).denoiser()) for s in ([0, 0], [0.5, 0.5]))
        evaluation = {
            "sampler": {"class_path": "DDIM", "init_args": {"steps": 2}},
            "judge": {"class_path": "Pixels"},
            "samples": 20,
            "batch_size": 10,
        }
        assert main([*arguments, *few, f"--evaluation={evaluation}"]) == 0
        protocol = Evaluation(DDIM(2), Pixels(), samples=20, batch_size=10)
        by = Samples(origin, Digits(), protocol)
        found = by(Bundle.load(tmp_path / "merged").denoiser)
        assert found <= min(by(merger.merged(s).denoiser()) for s in ([0, 0], [0.5, 0.5]))

    def test_a_folder_that_cannot_be_written_is_refused_before_any_search(
        self, tuned, monkeypatch, capsys
    ):
        monkeypatch.setattr(merging, "search", lambda *_: pytest.fail("searched"))
        first, *experts = map(str, tuned)
        arguments = ["merge", *experts, "--origin", first, "--output=/dev/null/x", "--data=Digits"]
        assert main(arguments) == 73
        assert "/dev/null/x cannot be written" in capsys.readouterr().err

    def test_it_finds_planted_shares(self, merger):
        goal = merger.weights([0.4, -0.2])

        def told(denoiser):
            own = denoiser.network.state_dict()
            return sum((own[key] - goal[key]).square().sum().item() for key in goal)

        assert search(merger, told, 60) == pytest.approx([0.4, -0.2], abs=0.02)
        # In few trials nothing is worse than where it began.
        assert told(merger.merged(search(merger, told, 1)).denoiser()) == told(
            merger.origin.denoiser()
        )


class TestDecoupled:
    def test_without_its_terms_it_is_mdm(self, study, fit, tmp_path):
        start = f"--model.init_from={study / 'baseline'}"
        plain = ["--model.keep=0", "--model.elsewhere=0"]
        assert fit(start, "--study.name=mdm") == 0
        assert fit("--model=Decoupled", start, *plain, "--study.name=plain") == 0
        assert fit("--model=Decoupled", start, "--study.name=own") == 0
        mdm, plain, own = (tmp_path / name / "expert-0" for name in ("mdm", "plain", "own"))
        step = checkpoints.step_of(checkpoints.newest(mdm / "checkpoints"))
        assert_equal(weights(mdm, step), weights(plain, step))
        with pytest.raises(AssertionError):
            assert_equal(weights(mdm, step), weights(own, step))

    def test_some_batches_are_of_the_whole_chain(self, study, monkeypatch):
        cli = ConfigOnly([*TINY, "--model=Decoupled", f"--model.init_from={study / 'baseline'}"])
        method, steps = cli.model, range(1000)
        drawn = []
        for step in steps:
            monkeypatch.setattr(Decoupled, "trainer", SimpleNamespace(global_step=step))
            drawn += method.drawn(0, ("expert-0", 0, step))
        assert set(drawn) == {Interval(), method.interval}
        assert drawn.count(Interval()) == pytest.approx(300, abs=3 * 14.5)

    def test_the_first_network_holds_it(self, study, fit, tmp_path):
        start = Expert.read(study / "baseline").weights

        def moved(keep):
            options = [f"--model.init_from={study / 'baseline'}", f"--model.keep={keep}"]
            options += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.003"]
            options += ["--model.optimizer.fused=false", "--model.network.dropout=0"]
            options += ["--trainer.max_steps=8"]
            name = f"keep-{keep:g}"
            assert fit("--model=Decoupled", *options, f"--study.name={name}") == 0
            _, raw = weights(tmp_path / name / "expert-0", 8)
            own = {k.removeprefix("denoiser.network."): v for k, v in raw.items()}
            return sum((own[key] - start[key]).square().sum().item() for key in start)

        assert moved(30.0) < 0.7 * moved(0.0)

    def test_it_resumes_exactly(self, study, fit, tmp_path):
        options = ["--model=Decoupled", f"--model.init_from={study / 'baseline'}"]
        options += ["--trainer.max_steps=8"]
        interrupt = ["--trainer.callbacks+=test_training.SignalAt", "--trainer.callbacks.step=5"]
        interrupt.append(f"--trainer.callbacks.number={int(signal.SIGTERM)}")
        assert SignalAt.__module__ == "test_training"
        assert fit(*options, *interrupt) == 75
        assert fit(*options) == 0
        assert fit(*options, "--study.name=whole") == 0
        halves, whole = (tmp_path / name / "expert-0" for name in ("tiny", "whole"))
        assert_equal(weights(halves, 8), weights(whole, 8))

    def test_its_control_is_the_plain_network(self, study):
        options = ["--model=Decoupled", f"--model.init_from={study / 'baseline'}"]
        planned = plan_config(ConfigOnly([*TINY, *options]), None)
        (baseline,) = planned.whole
        model = yaml.safe_load(yaml.safe_dump(baseline.config["model"]))
        assert model["class_path"] == "expertdiff.methods.single.Diffusion"
        assert model["init_args"]["init_from"] == str(study / "baseline")
        assert not {"keep", "elsewhere", "expert"} & model["init_args"].keys()
        shared = [*TINY, "--model=Decoupled", "--study.shared=4"]  # is what they start from
        assert len(plan_config(ConfigOnly(shared), None).first) == 1

    @pytest.mark.parametrize(
        "options, sentence",
        [
            ([], "model.init_from"),
            (["--model.keep=-1"], "keep -1.0 must not be negative"),
            (["--model.elsewhere=2"], "elsewhere 2.0 must be in"),
            (["--model.timesteps=LossSecondMoment"], "use Uniform timesteps"),
            (["--model.timesteps=Staged"], "use Uniform timesteps"),
        ],
    )
    def test_refuses(self, study, fit, capsys, options, sentence):
        start = [f"--model.init_from={study / 'baseline'}"] if options else []
        assert fit("--model=Decoupled", *start, *options) == 2
        assert sentence in capsys.readouterr().err


class TestDistillation:
    def fit(self, fit, study, *options):
        teacher = f"--model.teacher={study / 'bundles/stitched'}"
        return fit("--model=Distillation", teacher, *options)

    def test_a_teacher_teaches_itself_nothing(self, fit, study, tmp_path):
        baseline = study / "bundles/baseline"
        options = [f"--model.teacher={baseline}", f"--model.init_from={baseline}/00.safetensors"]
        options += ["--model.network.dropout=0", "--trainer.max_steps=4"]
        start = Expert.read(study / "baseline")
        assert fit("--model=Distillation", *options) == 0
        averaged, raw = weights(tmp_path / "tiny/distilled", 4)
        for key, value in start.weights.items():
            torch.testing.assert_close(raw[f"denoiser.network.{key}"], value, atol=1e-5, rtol=0)
        told = [
            row
            for row in read_metrics(tmp_path / "tiny/distilled/metrics.jsonl")
            if "train/loss" in row
        ]
        assert told and all(row["train/loss"] < 1e-8 for row in told)

    def test_it_comes_nearer_its_teacher_than_by_data_alone(self, fit, study, tmp_path):
        steps = "--trainer.max_steps=40"
        assert self.fit(fit, study, steps) == 0
        assert fit("--model=Diffusion", steps) == 0
        teacher, gaps = Bundle.load(study / "bundles/stitched").denoiser, []
        torch.manual_seed(0)
        x_t, t = torch.randn(64, 1, 8, 8), torch.arange(64) * 15
        for name in ("baseline", "distilled"):
            student = Expert.read(tmp_path / "tiny" / name).denoiser()
            with torch.no_grad():
                gaps.append((student(x_t, t).eps - teacher(x_t, t).eps).square().mean().item())
        assert gaps[1] < 0.9 * gaps[0]

    def test_the_teacher_is_no_part_of_it(self, fit, study, tmp_path):
        assert self.fit(fit, study, "--trainer.max_steps=4") == 0
        content = checkpoints.load(checkpoints.newest(tmp_path / "tiny/distilled/checkpoints"))
        assert all(key.startswith("denoiser.network.") for key in content["state_dict"])
        taught = content[checkpoints.IDENTITY]["teacher"]
        assert taught == sha256_of(study / "bundles/stitched/manifest.json")

    @pytest.mark.parametrize(
        "options, sentence",
        [
            (["--model.process.betas=LinearBetas"], "is no teacher of this network (process.betas"),
            (["--model.prediction=V"], "is no teacher of this network (prediction.class_path"),
            (
                ["--model.network.num_classes=10"],
                "is no teacher of this network (num_classes: 10 != None)",
            ),
        ],
    )
    def test_refuses(self, fit, study, capsys, options, sentence):
        assert self.fit(fit, study, *options) == 2
        assert sentence in capsys.readouterr().err

    def test_a_teacher_of_other_data_is_refused(self, study, tmp_path, capsys):
        teacher = ["--model=Distillation", f"--model.teacher={study / 'bundles/stitched'}"]
        points = ["--data=Toy2D", "--data.density=Moons", "--data.batch_size=8"]
        assert main(["fit", *TINY, *teacher, *points, f"--study.root={tmp_path}"]) == 2
        assert "was trained on data of shape [1, 8, 8]" in capsys.readouterr().err
