"""DDPM++ against its published size and against plain formulas on its state_dict."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertdiff.describe import build, describe
from expertdiff.networks.ddpmpp import Attention, DDPMpp, GroupNorm, ResBlock
from expertdiff.networks.network import Network

TINY = {
    "image_size": 8,
    "model_channels": 16,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (4,),
}


def tiny(**options) -> DDPMpp:
    """A small network in which every parameter matters."""
    torch.manual_seed(0)
    net = DDPMpp(**{**TINY, **options})
    for p in net.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8), torch.tensor([999e-5, 17.25, 999.0])


def test_published_parameter_and_tensor_count():
    with torch.device("meta"):
        net = DDPMpp(32)
    assert sum(p.numel() for p in net.parameters()) == 61_804_419
    assert len(net.state_dict()) == len(list(net.parameters())) == 564
    assert sum(isinstance(module, ResBlock) for module in net.modules()) == 16 + 3 + 2 + 20 + 3


def test_attention_lies_after_each_block_down_once_up_and_in_the_middle():
    with torch.device("meta"):
        net = DDPMpp(32)
    where = [name for name, module in net.named_modules() if isinstance(module, Attention)]
    # Convolution, level 32 (4 blocks and a halving one), level 16; on the way up levels 4, 8, 16.
    down = [f"input_blocks.{i}.1" for i in range(6, 10)]
    assert where == [*down, "middle_block.1", "output_blocks.14.1"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_res_blocks": 2, "channel_mult": (1, 2, 3), "attention_resolutions": (8, 2)},
        {"model_channels": 24, "channel_mult": (2, 1), "attention_resolutions": ()},
    ],
    ids=str,
)
def test_equals_plain_formulas_on_the_state_dict(options):
    net = tiny(**options).double()
    x_t, t = batch()
    with torch.no_grad():
        out = net(x_t.double(), t)
        plain = plain_ddpmpp(net.state_dict(), {**TINY, **options}, x_t, t)
    assert out.shape == (3, 3, 8, 8) and out.std() > 0.1
    # Only the frequencies are float32.
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-4 * out.std().item())


def plain_ddpmpp(state: dict, options: dict, x_t: Tensor, t: Tensor) -> Tensor:
    """DDPM++ in float64, built from nothing but the tensors and their names."""

    def linear(name, x):  # over dim 1, whatever the kernel's trailing ones
        shape = (1, -1) + (1,) * (x.dim() - 2)
        weight = state[f"{name}.weight"].flatten(1)
        return torch.einsum("oc,bc...->bo...", weight, x) + state[f"{name}.bias"].view(shape)

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def norm(name, x):
        h = x.reshape(len(x), min(x.shape[1] // 4, 32), -1)
        h = (h - h.mean(2, True)) / (h.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return h.view_as(x) * weight + bias

    def resized(x, by):
        if by == 0.5:
            return (
                x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
            ) / 4
        return x.repeat_interleave(by, 2).repeat_interleave(by, 3)

    def res(name, x, by=1):
        h = conv(f"{name}.conv1", resized(F.silu(norm(f"{name}.norm1", x)), by))
        h = h + linear(f"{name}.emb", F.silu(temb))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        if by != 1 or x.shape[1] != h.shape[1]:
            x = linear(f"{name}.shortcut", resized(x, by))
        return (x + h) / 2**0.5

    def attention(name, x):
        h = norm(f"{name}.norm", x).flatten(2)
        q, k, v = (linear(f"{name}.{part}", h) for part in "qkv")
        weights = (torch.einsum("bcq,bck->bqk", q, k) * x.shape[1] ** -0.5).softmax(2)
        h = linear(f"{name}.out", torch.einsum("bqk,bck->bcq", weights, v))
        return (x + h.view_as(x)) / 2**0.5

    width, levels = options["model_channels"], len(options["channel_mult"])
    angles = t.double()[:, None] * 10_000 ** (-torch.arange(width // 2) / (width // 2 - 1))
    temb = torch.cat([angles.sin(), angles.cos()], 1)
    temb = linear("time_embed.2", F.silu(linear("time_embed.0", temb)))
    h = conv("input_blocks.0.0", x_t.double())
    skips, i = [h], 1
    for level in range(levels):
        for _ in range(options["num_res_blocks"]):
            h = res(f"input_blocks.{i}.0", h)
            if h.shape[2] in options["attention_resolutions"]:
                h = attention(f"input_blocks.{i}.1", h)
            skips.append(h)
            i += 1
        if level < levels - 1:
            h = res(f"input_blocks.{i}.0", h, 0.5)
            skips.append(h)
            i += 1
    h = res("middle_block.0", h)
    h = res("middle_block.2", attention("middle_block.1", h))
    i = 0
    for level in reversed(range(levels)):
        for _ in range(options["num_res_blocks"] + 1):
            h = res(f"output_blocks.{i}.0", torch.cat([h, skips.pop()], 1))
            i += 1
        j = 1
        if h.shape[2] in options["attention_resolutions"]:
            h, j = attention(f"output_blocks.{i - 1}.1", h), 2
        if level:
            h = res(f"output_blocks.{i - 1}.{j}", h, 2)
    assert not skips
    return conv("out.2", F.silu(norm("out.0", h)))


def test_embeds_the_number_it_is_given_sines_first():
    net, seen = tiny(model_channels=128), []
    net.time_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x_t, t = batch()
    net(x_t, t)
    rates = [math.exp(-math.log(1e4) * j / 63) for j in range(64)]
    expected = [[f(s * r) for f in (math.sin, math.cos) for r in rates] for s in t.tolist()]
    torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_fresh_network_outputs_almost_nothing():
    torch.manual_seed(0)
    out = DDPMpp(**TINY)(*batch())
    assert 1e-7 < out.abs().max() < 1e-4


def test_weights_start_uniform_with_variance_scale_over_mean_fan():
    torch.manual_seed(0)
    net = DDPMpp(**TINY, in_channels=1)
    scales = []
    for name, layer in net.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        last = name == "out.2" or name.endswith("conv2") or name.endswith(".out")
        scales.append(1e-10 if last else 0.1 if name.endswith((".q", ".k", ".v")) else 1)
        fans = sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
        bound = math.sqrt(3 * scales[-1] / (fans / 2))
        assert 0.95 * bound < layer.weight.abs().max() <= bound, name
        uniform = pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert layer.weight.std().item() == uniform, name
        assert not layer.bias.any(), name
    # 10 residual blocks, 3 attentions, the last layer; q, k and v of the 3 attentions.
    assert [scales.count(1e-10), scales.count(0.1)] == [10 + 3 + 1, 9]


def test_dropout_acts_in_training_only():
    net = tiny(dropout=0.5)
    inputs = batch()
    assert not torch.allclose(net.train()(*inputs), net(*inputs), atol=1e-2)
    assert torch.equal(net.eval()(*inputs), net(*inputs))


def test_every_parameter_learns():
    net = tiny()
    net(*batch()).square().mean().backward()
    # One number added to all keys of a query changes no attention.
    idle = {name for name, p in net.named_parameters() if p.grad.abs().max() < 1e-6}
    assert {name.rpartition(".")[0][-2:] for name in idle} <= {".k"}


def test_channels_last_is_kept_and_changes_nothing():
    net, formats = tiny(), []
    x_t, t = batch()
    contiguous = net(x_t, t)

    def note(module, inputs, output):
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, (GroupNorm, ResBlock, Attention)):
            module.register_forward_hook(note)
    net.to(memory_format=torch.channels_last)
    last = net(x_t.contiguous(memory_format=torch.channels_last), t)
    assert len(formats) > 20 and all(formats)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, contiguous, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_stays_in_bf16_and_near_float32():
    net, inputs, dtypes = tiny(model_channels=32), batch(), set()
    exact = net(*inputs)
    for module in net.modules():
        if isinstance(module, (GroupNorm, ResBlock, Attention)):
            module.register_forward_hook(lambda m, i, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(*inputs)
    assert dtypes == {torch.bfloat16}
    assert (rounded.float() - exact).std() < 0.03 * exact.std()


def test_is_built_again_from_its_description():
    net = tiny(channel_mult=(1, 1), in_channels=1)
    again = build(describe(net), Network)
    again.load_state_dict(net.state_dict(), strict=True)
    x_t, t = batch()
    assert torch.equal(again(x_t[:, :1], t), net(x_t[:, :1], t))


@pytest.mark.parametrize(
    "channels, groups", [(128, 32), (384, 32), (96, 24), (36, 9), (16, 4), (144, 24), (6, 1)]
)
def test_groups_are_a_quarter_of_the_channels_up_to_32(channels, groups):
    norm = GroupNorm(channels)
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 28, "channel_mult": (1, 2, 2, 2)}, "^image_size 28 .* multiple of 8 "),
        ({"model_channels": 15}, "^model_channels 15 .* even number of at least 4$"),
        ({"model_channels": 2}, "^model_channels 2 .* even number of at least 4$"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DDPMpp(**{**TINY, **options})
