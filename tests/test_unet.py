"""The ADM UNet against its published sizes and against plain formulas on its state_dict."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from expertdiff.networks.unet import ADMUNet, GroupNorm, ResBlock

TINY = {
    "image_size": 8,
    "model_channels": 16,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (4,),
    "num_head_channels": 8,
}


def adm(**options) -> ADMUNet:
    with torch.device("meta"):
        return ADMUNet(32, **options)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(**options) -> ADMUNet:
    """A small network in which every parameter matters."""
    torch.manual_seed(0)
    net = ADMUNet(**{**TINY, **options})
    for p in net.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net


def batch(net: ADMUNet, n: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    y = None if net.num_classes is None else torch.arange(n) % net.num_classes
    return torch.randn(n, 3, 8, 8), torch.tensor([0, 17, 999])[:n], y


@pytest.mark.parametrize(
    "options, parameters",
    [
        ({}, 53_010_566),
        ({"learn_sigma": False}, 53_007_107),
        ({"use_scale_shift_norm": False}, 49_530_374),
        ({"attention_resolutions": (16, 8)}, 52_546_438),
        ({"resblock_updown": True}, 57_558_790),
        ({"resblock_updown": True, "learn_sigma": False}, 57_555_331),
        ({"num_classes": 10}, 53_010_566 + 10 * 512),
    ],
)
def test_published_parameter_counts(options, parameters):
    assert size(adm(**options)) == parameters


def test_parameters_by_part():
    assert {name: size(part) for name, part in adm().named_children()} == {
        "time_embed": 328_704,
        "input_blocks": 17_125_760,
        "middle_block": 3_151_360,
        "output_blocks": 32_397_568,
        "out": 7_174,
    }


def test_official_keys_and_shapes():
    state = {key: tuple(value.shape) for key, value in adm(num_classes=10).state_dict().items()}
    assert len(state) == 489  # the 488 of the unconditional network, and the labels
    expected = {
        "time_embed.0.weight": (512, 128),
        "time_embed.2.weight": (512, 512),
        "label_emb.weight": (10, 512),
        "input_blocks.0.0.weight": (128, 3, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (128,),
        "input_blocks.1.0.in_layers.2.weight": (128, 128, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (256, 512),
        "input_blocks.1.0.out_layers.0.bias": (128,),
        "input_blocks.1.0.out_layers.3.weight": (128, 128, 3, 3),
        "input_blocks.1.1.norm.weight": (128,),
        "input_blocks.1.1.qkv.weight": (384, 128, 1),
        "input_blocks.1.1.proj_out.weight": (128, 128, 1),
        "input_blocks.4.0.op.weight": (128, 128, 3, 3),
        "input_blocks.5.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.15.0.out_layers.3.bias": (256,),
        "middle_block.0.in_layers.2.weight": (256, 256, 3, 3),
        "middle_block.1.qkv.bias": (768,),
        "middle_block.2.out_layers.3.weight": (256, 256, 3, 3),
        "output_blocks.3.1.conv.weight": (256, 256, 3, 3),  # no attention at 4x4
        "output_blocks.7.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.11.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.15.1.proj_out.bias": (128,),
        "out.0.weight": (128,),
        "out.2.weight": (6, 128, 3, 3),
    }
    assert {key: state.get(key) for key in expected} == expected
    joined = (state[f"output_blocks.{i}.0.in_layers.0.weight"] for i in range(16))
    assert Counter(joined) == {(512,): 11, (384,): 2, (256,): 3}
    assert "output_blocks.16.0.in_layers.0.weight" not in state


def test_a_fresh_network_outputs_zero_because_53_layers_start_at_zero():
    net = ADMUNet(32)
    zeros = [key for key, p in net.named_parameters() if p.dim() > 1 and not p.any()]
    kinds = Counter(key.rpartition("layers.3")[1] or key.split(".")[-2] for key in zeros)
    assert kinds == {"layers.3": 30, "proj_out": 22, "2": 1}
    # By products alone: not every torch counts its fused attention on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = net(torch.randn(1, 3, 32, 32), torch.tensor([999]))
    assert torch.equal(out, torch.zeros(1, 6, 32, 32))
    assert counter.get_total_flops() == pytest.approx(21.5e9, rel=0.005)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_new_attention_order": True},
        {"resblock_updown": True},
        {"use_scale_shift_norm": False, "learn_sigma": False},
        {"num_classes": 4},
        {"model_channels": 24, "num_head_channels": 32, "num_heads": 3, "num_res_blocks": 2},
    ],
    ids=str,
)
def test_equals_plain_formulas_on_the_state_dict(options):
    net = tiny(**options).double()
    x_t, t, y = batch(net)
    options = {**TINY, **options}
    width = 2 * options["model_channels"]
    options["num_heads"] = options.get("num_heads", width // options["num_head_channels"])
    with torch.no_grad():
        out, plain = net(x_t.double(), t, y), plain_adm(net.state_dict(), options, x_t, t, y)
    assert out.std() > 0.1
    # Only the frequencies are float32.
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-4 * out.std().item())


def plain_adm(state: dict, options: dict, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """ADM in float64, built from nothing but the tensors and their names."""
    blocks = options["num_res_blocks"] + 1

    def linear(name, x):  # over dim 1, whatever the kernel's trailing ones
        shape = (1, -1) + (1,) * (x.dim() - 2)
        weight = state[f"{name}.weight"].flatten(1)
        return torch.einsum("oc,bc...->bo...", weight, x) + state[f"{name}.bias"].view(shape)

    def conv(name, x, stride=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding=1)

    def norm(name, x):
        groups = {16: 4, 24: 6, 32: 32, 48: 12, 64: 32, 72: 18, 96: 32}[x.shape[1]]
        h = x.reshape(len(x), groups, -1)
        h = (h - h.mean(2, True)) / (h.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return h.view_as(x) * weight + bias

    def resized(x, by):
        if by == 0.5:
            return (
                x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
            ) / 4
        return x.repeat_interleave(by, 2).repeat_interleave(by, 3)

    def res(name, x, emb, resize=1):
        h = resized(F.silu(norm(f"{name}.in_layers.0", x)), resize)
        h = conv(f"{name}.in_layers.2", h)
        e = linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if options.get("use_scale_shift_norm", True):
            scale, shift = e.chunk(2, 1)
            h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(f"{name}.out_layers.0", h + e)
        h = conv(f"{name}.out_layers.3", F.silu(h))
        x = resized(x, resize)
        if f"{name}.skip_connection.weight" in state:
            x = linear(f"{name}.skip_connection", x)
        return x + h

    def attention(name, x):
        rows = linear(f"{name}.qkv", norm(f"{name}.norm", x).flatten(2))
        heads = options["num_heads"]
        d = x.shape[1] // heads
        out = []
        for head in range(heads):
            if options.get("use_new_attention_order"):
                q, k, v = (rows[:, (i * heads + head) * d :][:, :d] for i in range(3))
            else:
                q, k, v = (rows[:, (3 * head + i) * d :][:, :d] for i in range(3))
            weights = (torch.einsum("bdq,bdk->bqk", q, k) / math.sqrt(d)).softmax(2)
            out.append(torch.einsum("bqk,bdk->bdq", weights, v))
        return x + linear(f"{name}.proj_out", torch.cat(out, 1)).view_as(x)

    def run(prefix, x, emb, resize=1):
        j = 0
        while any(key.startswith(f"{prefix}.{j}.") for key in state):
            name = f"{prefix}.{j}"
            if f"{name}.qkv.weight" in state:
                x = attention(name, x)
            elif f"{name}.op.weight" in state:
                x = conv(f"{name}.op", x, stride=2)
            elif f"{name}.conv.weight" in state:
                x = conv(f"{name}.conv", resized(x, 2))
            elif f"{name}.in_layers.2.weight" in state:
                # Up-sampling residual blocks close their group, down-sampling ones are alone.
                up = prefix.startswith("output") and j > 0
                x = res(name, x, emb, 2 if up else resize)
            else:
                x = conv(name, x)
            j += 1
        return x

    half = options["model_channels"] // 2
    angles = torch.stack([t * 10_000 ** (-j / half) for j in range(half)], 1)
    emb = torch.cat([angles.cos(), angles.sin()], 1).double()
    emb = linear("time_embed.2", F.silu(linear("time_embed.0", emb)))
    if y is not None:
        emb = emb + state["label_emb.weight"][y]
    h, skips = x_t.double(), []
    for i in range(2 * blocks):
        down = i == blocks and options.get("resblock_updown")
        h = run(f"input_blocks.{i}", h, emb, 0.5 if down else 1)
        skips.append(h)
    h = run("middle_block", h, emb)
    for i in range(2 * blocks):
        h = run(f"output_blocks.{i}", torch.cat([h, skips.pop()], 1), emb)
    return conv("out.2", F.silu(norm("out.0", h)))


def test_attention_orders_differ_by_a_permutation_of_channels():
    """A converter between the two needs nothing but this permutation of qkv."""
    legacy, new = tiny(), tiny(use_new_attention_order=True)
    state = legacy.state_dict()
    for key in [key for key in state if ".qkv." in key]:
        rows = state[key].unflatten(0, (4, 3, 8))
        state[key] = rows.transpose(0, 1).flatten(0, 2)
    inputs = batch(legacy)
    assert not torch.allclose(new(*inputs), legacy(*inputs), atol=1e-3)
    new.load_state_dict(state, strict=True)
    torch.testing.assert_close(new(*inputs), legacy(*inputs), rtol=1e-4, atol=1e-4)


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    calls, gradients = [], []
    for checkpointing in (False, True):
        net = tiny(dropout=0.5, checkpointing=checkpointing)
        inputs = batch(net)
        without_dropout = net.eval()(*inputs)
        net.train()
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        for block in net.modules():
            if isinstance(block, ResBlock):
                block.register_forward_pre_hook(count)
        torch.manual_seed(2)
        out = net(*inputs)
        out.square().mean().backward()
        assert not torch.allclose(out, without_dropout, atol=1e-2)
        gradients.append([p.grad for p in net.parameters()])
    assert calls[1] == 2 * calls[0]
    for plain, recomputed in zip(*gradients):
        assert plain.abs().sum() > 0
        assert torch.equal(plain, recomputed)


def test_channels_last_is_kept_and_changes_nothing():
    net = tiny()
    x_t, t, y = batch(net)
    contiguous = net(x_t, t, y)
    formats = []

    def note(module, inputs, output):
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, (GroupNorm, ResBlock)):
            module.register_forward_hook(note)
    net.to(memory_format=torch.channels_last)
    last = net(x_t.contiguous(memory_format=torch.channels_last), t, y)
    assert len(formats) > 20 and all(formats)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, contiguous, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_stays_in_bf16_and_near_float32():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = tiny(model_channels=32).to(device)
    inputs = [each.to(device) for each in batch(net)[:2]]
    exact = net(*inputs)
    dtypes = set()
    for module in net.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(lambda m, i, output: dtypes.add(output.dtype))
    with torch.autocast(device, torch.bfloat16):
        rounded = net(*inputs)
    assert dtypes == {torch.bfloat16}
    assert (rounded.float() - exact).std() < 0.03 * exact.std()


def test_float_times_are_raw_timesteps():
    net = tiny()
    x_t, t, _ = batch(net)
    assert torch.equal(net(x_t, t), net(x_t, t.float()))
    assert not torch.allclose(net(x_t, t), net(x_t, t / 1000), atol=1e-3)


def test_compiles_in_place_without_breaks_and_keeps_its_keys():
    net = tiny(checkpointing=True, channel_mult=(1,), num_res_blocks=0)
    keys, inputs = list(net.state_dict()), batch(net)
    out = net(*inputs)
    net.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(net(*inputs), out)
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize(
    "channels, groups", [(32, 32), (96, 32), (256, 32), (16, 4), (48, 12), (144, 24), (6, 1)]
)
def test_groups_divide_the_channels(channels, groups):
    assert GroupNorm(channels).num_groups == groups


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 28, "channel_mult": (1, 2, 2, 2)}, "image_size 28"),
        ({"model_channels": 15}, "model_channels 15"),
        ({"num_head_channels": 24}, "num_head_channels=24"),
        ({"num_heads": 5}, "num_heads=5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ADMUNet(**{**TINY, **options})


@pytest.mark.parametrize("num_classes, y", [(None, torch.zeros(3, dtype=torch.long)), (4, None)])
def test_labels_go_with_num_classes(num_classes, y):
    net = ADMUNet(**TINY, num_classes=num_classes)
    x_t, t, _ = batch(net)
    with pytest.raises(ValueError, match=f"num_classes is {num_classes}"):
        net(x_t, t, y)
