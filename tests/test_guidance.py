"""Classifier-free guidance against its formula, by hand."""

import pytest
import torch
from torch import Tensor, nn

from expertdiff.describe import build, describe
from expertdiff.diffusion.denoiser import X0, Denoiser, Eps, NetworkDenoiser, PredictionType, V
from expertdiff.diffusion.guidance import ClassifierFree, Guidance
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP, LinearBetas, expand
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.experts.routed import RoutedExperts
from expertdiff.networks.dit import DiT
from expertdiff.networks.unet import ADMUNet

PROCESS = DiscreteVP(LinearBetas())


def dit(seed: int = 0, **options) -> DiT:
    torch.manual_seed(seed)
    options = {"size": (1, 16, 2), "num_classes": 5, "label_dropout": 0.1, **options}
    net = DiT(image_size=4, in_channels=4, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net.eval().requires_grad_(False)


def denoiser(seed: int = 0, prediction: PredictionType | None = None, **options) -> Denoiser:
    return NetworkDenoiser(dit(seed, **options), PROCESS, prediction or Eps())


def routed() -> RoutedExperts:
    return RoutedExperts([denoiser(seed) for seed in range(3)], Partition([0, 0.1, 0.8, 1]))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    t = torch.tensor([999, 5, 400, 99, 100, 799])  # of all experts, out of order
    return torch.randn(6, 4, 4, 4), t, torch.arange(6) % 5


@pytest.mark.parametrize("make", [denoiser, routed])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_is_the_formula_for_each_sample_alone(make, channels, scale):
    model, (x_t, t, y) = make(), batch()
    found = ClassifierFree(scale, channels)(model)(x_t, t, y)
    for i in range(len(x_t)):
        one = slice(i, i + 1)
        labelled = model(x_t[one], t[one], y[one])
        null = model(x_t[one], t[one], torch.tensor([5]))
        eps = labelled.eps.clone()
        for c in range(4 if channels is None else channels):
            eps[0, c] = null.eps[0, c] + scale * (labelled.eps[0, c] - null.eps[0, c])
        alpha, sigma = PROCESS.alpha_sigma(t[i])
        assert not torch.allclose(null.eps, labelled.eps, atol=1e-2)
        torch.testing.assert_close(found.eps[one], eps, rtol=1e-5, atol=1e-5)
        x0 = ((x_t[one] - sigma * eps) / alpha).float()
        torch.testing.assert_close(found.x0[one], x0, rtol=1e-5, atol=1e-5 / alpha.item())
        torch.testing.assert_close(found.variance[one], labelled.variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", [Eps(), X0(), V()])
def test_x0_and_eps_stay_on_the_line_through_x_t(prediction):
    process = DiscreteVP(CosineBetas())  # alpha is 5e-5 at its end
    model = NetworkDenoiser(dit(), process, prediction)
    x_t, t, y = batch()
    guided = ClassifierFree(3.0, channels=2)(model)(x_t, t, y)
    alpha, sigma = (expand(c, x_t) for c in process.alpha_sigma(t))
    scale = guided.eps.abs().max().item()
    line = alpha * guided.x0 + sigma * guided.eps
    torch.testing.assert_close(line, x_t, rtol=0, atol=1e-6 * scale)


def test_scale_1_is_the_conditional_model_in_one_call_of_as_many_rows():
    model, (x_t, t, y) = denoiser(), batch()
    rows = []
    model.network.register_forward_pre_hook(lambda net, inputs: rows.append(len(inputs[0])))
    found, plain = ClassifierFree(1.0)(model)(x_t, t, y), model(x_t, t, y)
    assert rows == [6, 6]
    assert torch.equal(found.x0, plain.x0) and torch.equal(found.eps, plain.eps)
    assert torch.equal(found.variance, plain.variance)


def test_guidance_is_one_call_of_twice_the_rows():
    model, (x_t, t, y) = denoiser(), batch()
    labels = []
    model.network.register_forward_pre_hook(lambda net, inputs: labels.append(inputs[2].tolist()))
    ClassifierFree(1.5)(model)(x_t, t, y)
    assert labels == [[0, 1, 2, 3, 4, 0, 5, 5, 5, 5, 5, 5]]


def test_what_is_not_guided_does_not_depend_on_the_scale():
    model, (x_t, t, y) = routed(), batch()
    some, more = (ClassifierFree(scale, channels=3)(model)(x_t, t, y) for scale in (1.5, 7.0))
    plain = model(x_t, t, y)
    for found in (some, more):
        torch.testing.assert_close(found.variance, plain.variance)
        torch.testing.assert_close(found.eps[:, 3], plain.eps[:, 3])
    assert torch.equal(some.variance, more.variance)
    assert torch.equal(some.eps[:, 3], more.eps[:, 3])
    assert torch.equal(some.x0[:, 3], more.x0[:, 3])
    assert (some.eps[:, :3] != more.eps[:, :3]).all()


def test_a_network_without_a_learned_variance_has_none_guided():
    model, (x_t, t, y) = denoiser(learn_sigma=False), batch()
    assert ClassifierFree(1.5)(model)(x_t, t, y).variance is None


def test_has_the_process_and_partition_of_what_it_guides():
    model = routed()
    guided = ClassifierFree(1.5)(model)
    assert guided.process is model.process
    assert guided.partition is model.partition and len(guided.partition) == 3


def test_samples_as_by_hand():
    class ByHand(Denoiser):
        process = PROCESS

        def forward(self, x_t, t, y=None):
            labelled, null = model(x_t, t, y), model(x_t, t)
            labelled.eps = null.eps + 2 * (labelled.eps - null.eps)
            alpha, sigma = (expand(c, x_t) for c in PROCESS.alpha_sigma(t))
            labelled.x0 = (x_t - sigma * labelled.eps) / alpha
            return labelled

    model, sampler = denoiser(), DDIM(steps=5)
    noise, y = SampleNoise(0, [0, 1], (4, 4, 4), "cpu"), torch.tensor([0, 3])
    found = sampler(ClassifierFree(2.0)(model), noise, y)
    torch.testing.assert_close(found, sampler(ByHand(), noise, y), rtol=0, atol=1e-4)
    assert not torch.allclose(found, sampler(model, noise, y), atol=1e-2)


@pytest.mark.parametrize(
    "model, null",
    [
        (denoiser(num_classes=None), "None"),
        (denoiser(label_dropout=0.0), "None"),
        (NetworkDenoiser(ADMUNet(8, model_channels=32, num_classes=3), PROCESS, Eps()), "None"),
        (RoutedExperts([denoiser(), denoiser(num_classes=7)], Partition([0, 0.5, 1])), "5 and 7"),
    ],
    ids=["no classes", "no null label", "a network that knows none", "two null labels"],
)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_refuses_a_model_without_one_null_label(model, null, scale):
    with pytest.raises(ValueError, match=f"null_class is {null}: train .*label_dropout"):
        ClassifierFree(scale)(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": -0.5}, "scale -0.5"),
        ({"scale": float("nan")}, "scale nan"),
        ({"scale": float("inf")}, "scale inf"),
        ({"scale": 1.5, "channels": 0}, "0 channels"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFree(**options)


def test_refuses_more_channels_than_there_are_and_a_call_without_labels():
    x_t, t, y = batch()
    with pytest.raises(ValueError, match="5 channels does not fit x_t of 4"):
        ClassifierFree(1.5, channels=5)(denoiser())(x_t, t, y)
    with pytest.raises(ValueError, match="without labels y"):
        ClassifierFree(1.5)(denoiser())(x_t, t)


def test_is_built_again_from_its_description():
    guidance = ClassifierFree(1.5, channels=3)
    again = build(describe(guidance), Guidance)
    assert (again.scale, again.channels) == (1.5, 3)
