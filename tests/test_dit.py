"""DiT against its published sizes and against plain formulas on its state_dict."""

import argparse
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from expertdiff.checkpoints import read_published
from expertdiff.describe import build, describe
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import VPSDE, DiscreteVP, LinearBetas
from expertdiff.networks.dit import SIZES, Block, DiT, modulated
from expertdiff.networks.network import Network

TINY = {
    "image_size": 8,
    "in_channels": 3,
    "patch_size": 2,
    "size": (2, 32, 4),
    "num_classes": 5,
    "label_dropout": 0.1,
}


def official(size, patch_size=2) -> DiT:
    with torch.device("meta"):
        return DiT(size=size, patch_size=patch_size)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(**options) -> DiT:
    """A small network in which every parameter matters."""
    torch.manual_seed(0)
    net = DiT(**{**TINY, **options})
    for name, p in net.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net.eval()


def batch(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), torch.tensor([0, 17, 999] * n)[:n], torch.arange(n) % 5


@pytest.mark.parametrize(
    "size, patch_size, parameters",
    [
        ("S", 2, 32_963_360),
        ("B", 2, 130_512_416),
        ("L", 2, 458_102_816),
        ("XL", 2, 675_129_632),
        ("S", 4, 32_945_024),
        ("S", 8, 33_148_160),
        ("B", 4, 130_475_648),
    ],
)
def test_published_parameter_counts(size, patch_size, parameters):
    net = official(size, patch_size)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert count(net) == parameters
    assert frozen == ["pos_embed"]
    assert net.pos_embed.shape == (1, (32 // patch_size) ** 2, SIZES[size][1])


@pytest.mark.parametrize(
    "size, mixed, shared",
    [
        ("S", 21_275_136, 11_589_920),
        ("B", 85_017_600, 45_298_208),
        ("L", 302_211_072, 155_629_600),
        ("XL", 446_197_248, 228_637_472),
    ],
)
def test_parameters_of_attention_and_mlp_and_of_all_else(size, mixed, shared):
    net = official(size)
    within = sum(count(block.attn) + count(block.mlp) for block in net.blocks)
    assert within == mixed
    assert count(net) - within - net.pos_embed.numel() == shared


@pytest.mark.parametrize("size, entries", [("S", 132), ("B", 132), ("XL", 292)])
def test_official_keys_and_shapes(size, entries):
    depth, width, _ = SIZES[size]
    expected = {
        "pos_embed": (1, 256, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (32, width),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
        "adaLN_modulation.1": (6 * width, width),
    }
    for i in range(depth):
        for name, shape in linear.items():
            expected |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    state = official(size).state_dict()
    assert len(state) == entries
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_keys_that_options_add_or_take():
    keys = set(DiT(**TINY).state_dict())
    without = set(DiT(**TINY | {"num_classes": None}).state_dict())
    assert keys - without == {"y_embedder.embedding_table.weight"} and not without - keys
    normed = set(DiT(**TINY, qk_norm=True).state_dict())
    assert {key.split(".", 2)[2] for key in normed - keys} == {
        f"attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")
    }
    assert set(DiT(**TINY, compiled=True, checkpointing=True).state_dict()) == keys


def test_a_fresh_network_outputs_zero_and_costs_what_the_paper_says():
    net = DiT(size="S").eval()
    # By products alone: not every torch counts its fused attention on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = net(torch.randn(1, 4, 32, 32), torch.tensor([999]), torch.tensor([207]))
    assert torch.equal(out, torch.zeros(1, 8, 32, 32))
    assert counter.get_total_flops() / 2e9 == pytest.approx(6.056, abs=0.001)


def test_first_weights():
    torch.manual_seed(0)
    net = DiT(size=(1, 192, 3))
    block = net.blocks[0]
    for module, fan in [(block.attn.qkv, 4 * 192), (block.mlp.fc2, 5 * 192)]:
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < module.weight.abs().max() <= bound
        assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    patches = net.x_embedder.proj.weight  # a linear layer on 16 numbers
    assert patches.std().item() == pytest.approx((2 / (16 + 192)) ** 0.5, rel=0.03)
    normal = [net.t_embedder.mlp[0], net.t_embedder.mlp[2], net.y_embedder.embedding_table]
    for module in normal:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert module.weight.abs().max() > 0.06  # not uniform
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_positions_have_the_column_first():
    ours, side = DiT(**TINY).pos_embed, 4
    assert ours.shape == (1, 16, 32)
    frequencies = 10_000.0 ** -(np.arange(8) / 8)
    for place in range(side * side):
        row, column = divmod(place, side)
        expected = np.concatenate(
            [wave(at * frequencies) for at in (column, row) for wave in (np.sin, np.cos)]
        )
        np.testing.assert_allclose(ours[0, place].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("t", [torch.tensor([0, 1, 500, 999]), torch.tensor([0.0, 0.3, 998.7])])
def test_time_is_embedded_as_cosines_then_sines(t):
    embedder = DiT(**TINY).t_embedder
    seen = []
    embedder.mlp = nn.Sequential(nn.Identity())
    embedder.mlp.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    embedder(t)
    angles = np.outer(t.numpy().astype(np.float64), np.exp(-math.log(1e4) * np.arange(128) / 128))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=2e-4)  # of angles up to 999


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 4, "learn_sigma": False},
        {"num_classes": None},
        {"size": (3, 24, 3), "mlp_ratio": 2.0, "in_channels": 3},
        {"qk_norm": True},
        {"label_dropout": 0.0},
    ],
    ids=str,
)
def test_equals_plain_formulas_on_the_state_dict(options):
    net = tiny(**options)
    x_t, t, y = batch()
    y = None if net.num_classes is None else y
    plain = plain_dit(net.state_dict(), {**TINY, **options}, x_t, t, y)
    with torch.no_grad():
        out = net(x_t, t, y)
    assert out.std() > 0.1
    torch.testing.assert_close(out, plain.float(), rtol=0, atol=1e-5 * out.abs().max().item())


def plain_dit(state: dict, options: dict, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """DiT in float64, one sample, head and patch at a time, from the tensors and their names."""
    state = {key: value.double() for key, value in state.items()}
    p, heads = options["patch_size"], options["size"][2]
    side = options["image_size"] // p

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, eps):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(name, x):
        parts = linear(f"{name}.qkv", x).chunk(3, dim=1)
        out = []
        for q, k, v in zip(*(part.chunk(heads, dim=1) for part in parts)):
            if options.get("qk_norm"):
                q, k = (
                    norm(part, 1e-5) * state[f"{name}.{which}_norm.weight"]
                    + state[f"{name}.{which}_norm.bias"]
                    for which, part in (("q", q), ("k", k))
                )
            weights = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
            out.append(weights / weights.sum(1, keepdim=True) @ v)
        return linear(f"{name}.proj", torch.cat(out, dim=1))

    results = []
    for n in range(len(x_t)):
        angles = t[n] * torch.exp(-math.log(10_000) / 128 * torch.arange(128))  # in float32
        waves = torch.cat([angles.cos(), angles.sin()]).double()
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
        if y is not None:
            c = c + state["y_embedder.embedding_table.weight"][y[n]]
        kernel = state["x_embedder.proj.weight"]
        tokens = []
        for row in range(side):
            for column in range(side):
                patch = x_t[n, :, row * p : (row + 1) * p, column * p : (column + 1) * p].double()
                tokens.append((kernel * patch).sum((1, 2, 3)) + state["x_embedder.proj.bias"])
        x = torch.stack(tokens) + state["pos_embed"][0]
        for i in range(options["size"][0]):
            b = f"blocks.{i}"
            parts = linear(f"{b}.adaLN_modulation.1", silu(c)).chunk(6)
            h = norm(x, 1e-6) * (1 + parts[1]) + parts[0]
            x = x + parts[2] * attention(f"{b}.attn", h)
            h = norm(x, 1e-6) * (1 + parts[4]) + parts[3]
            x = x + parts[5] * linear(f"{b}.mlp.fc2", gelu(linear(f"{b}.mlp.fc1", h)))
        shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).chunk(2)
        values = linear("final_layer.linear", norm(x, 1e-6) * (1 + scale) + shift)
        image = torch.zeros(values.shape[1] // p**2, side * p, side * p, dtype=torch.float64)
        for token, at in enumerate(values):
            row, column = divmod(token, side)
            for i in range(p):
                for j in range(p):
                    channels = at[(i * p + j) * len(image) :][: len(image)]
                    image[:, row * p + i, column * p + j] = channels
        results.append(image)
    return torch.stack(results)


def test_the_norm_adds_1e_6_to_the_variance():
    torch.manual_seed(0)
    x, shift, scale = 1e-3 * torch.randn(2, 5, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64)
    normed = (x - x.mean(2, True)) / (x.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulated(x, shift, scale), normed * (1 + scale) + shift)


def test_each_value_of_a_token_has_one_place_in_the_image():
    net = tiny()
    tokens = torch.arange(1 * 16 * 24).float().view(1, 16, 24)  # tokens x (2, 2, 6 channels)
    net.final_layer.forward = lambda x, c: tokens
    out = net(*batch(1))
    assert out.shape == (1, 6, 8, 8)
    for c, row, column in [(0, 0, 0), (5, 0, 0), (0, 0, 1), (0, 1, 0), (2, 3, 6), (4, 7, 7)]:
        token = row // 2 * 4 + column // 2
        value = (row % 2 * 2 + column % 2) * 6 + c
        assert out[0, c, row, column] == token * 24 + value


class TestLabels:
    def test_training_replaces_the_share_that_is_asked_for(self):
        net = tiny(label_dropout=0.3).train()
        table = net.y_embedder.embedding_table.weight
        torch.manual_seed(3)
        rows = net.y_embedder(torch.full((20_000,), 2))
        null, kept = (rows == table[5]).all(1), (rows == table[2]).all(1)
        assert (null ^ kept).all()
        assert null.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 20_000) ** 0.5)

    def test_the_global_generator_decides_which(self):
        net, (x_t, t, y) = tiny(label_dropout=0.5).train(), batch(8)
        outs = []
        for seed in (4, 4, 5):
            torch.manual_seed(seed)
            outs.append(net(x_t, t, y))
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])

    def test_evaluation_never_replaces_one_and_draws_nothing(self):
        net, (x_t, t, y) = tiny(label_dropout=1.0), batch(8)
        before = torch.get_rng_state()
        out = net(x_t, t, y)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.allclose(out, net(x_t, t), atol=1e-3)
        assert torch.equal(net.train()(x_t, t, y), net(x_t, t))

    def test_no_labels_mean_the_null_label(self):
        net, (x_t, t, y) = tiny(), batch()
        assert net.null_class == 5
        null = net(x_t, t, torch.full((3,), 5))
        assert torch.equal(net(x_t, t), null)
        assert not torch.allclose(net(x_t, t, y), null, atol=1e-3)

    def test_without_dropout_there_is_no_null_label(self):
        net, (x_t, t, _) = tiny(label_dropout=0.0), batch()
        assert net.null_class is None
        assert net.y_embedder.embedding_table.num_embeddings == 5
        with pytest.raises(ValueError, match="num_classes 5 and no null label"):
            net(x_t, t)

    def test_an_unconditional_network_takes_none(self):
        net, (x_t, t, y) = tiny(num_classes=None), batch()
        assert net.null_class is None and net.num_classes is None
        with pytest.raises(ValueError, match="num_classes is None"):
            net(x_t, t, y)

    @pytest.mark.parametrize("dropout, label, last", [(0.1, 6, 5), (0.0, 5, 4), (0.1, -1, 5)])
    def test_a_label_out_of_range_is_named(self, dropout, label, last):
        x_t, t, _ = batch()
        with pytest.raises(ValueError, match=rf"label {label} must be in \[0, {last}\]"):
            tiny(label_dropout=dropout)(x_t, t, torch.tensor([0, label, 1]))


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    calls, gradients = [], []
    for checkpointing in (False, True):
        net = tiny(checkpointing=checkpointing, label_dropout=0.5).train()
        calls.append(0)

        def tell(*_):
            calls[-1] += 1

        for block in net.blocks:
            block.register_forward_pre_hook(tell)
        torch.manual_seed(2)
        net(*batch()).square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert calls == [2, 4]
    assert gradients[0].pop("pos_embed") is gradients[1].pop("pos_embed") is None
    for name, plain in gradients[0].items():
        assert plain.abs().sum() > 0, name
        assert torch.equal(plain, gradients[1][name])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_autocast_multiplies_in_bf16_and_conditions_in_float32(qk_norm):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = tiny(qk_norm=qk_norm).to(device)
    inputs = [each.to(device) for each in batch()]
    exact, dtypes = net(*inputs), {}
    for name, module in net.named_modules():
        if isinstance(module, (nn.Linear, Block)):
            module.register_forward_hook(lambda m, i, out, name=name: dtypes.update({name: out}))
    with torch.autocast(device, torch.bfloat16):
        rounded = net(*inputs)
    half = {name for name, out in dtypes.items() if out.dtype == torch.bfloat16}
    assert half == {
        f"blocks.{i}.{part}"
        for i in range(2)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).std() < 0.03 * exact.std()


def test_blocks_compile_in_place_without_breaks_and_keep_their_keys():
    net, inputs = tiny(), batch()
    keys, out = list(net.state_dict()), net(*inputs)
    for block in net.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(net(*inputs), out)
    assert list(net.state_dict()) == keys


def test_compiled_compiles_each_block_and_nothing_else(monkeypatch):
    told = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: told.append(type(module)))
    DiT(**TINY, compiled=True)
    assert told == [Block, Block]


@pytest.mark.parametrize("process", [DiscreteVP(LinearBetas()), VPSDE()])
def test_any_process_may_tell_it_of_t(process):
    t = process.times(torch.tensor([0.1, 0.5, 0.9]), Interval())
    x_t, _, y = batch()
    prediction = NetworkDenoiser(tiny(), process, Eps())(x_t, t, y)
    assert prediction.eps.isfinite().all() and prediction.variance.shape == x_t.shape


def test_is_built_again_from_its_description():
    net = DiT(**TINY)
    again = build(describe(net), Network)
    assert describe(again) == describe(net)
    again.load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 3}, "patch_size 3 does not divide image_size 8"),
        ({"size": (2, 32, 5)}, r"size \[2, 32, 5\]"),
        ({"size": (2, 30, 3)}, r"size \[2, 30, 3\]"),
        ({"size": (0, 32, 4)}, r"size \[0, 32, 4\]"),
        ({"size": "M"}, "size 'M' must be one of S, B, L, XL"),
        ({"label_dropout": 1.5}, "label_dropout 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**TINY, **options})


def test_images_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\), not \(3, 16, 16\)"):
        tiny()(torch.zeros(1, 3, 16, 16), torch.tensor([0]))


class TestOfficialFiles:
    def test_averaged_weights_else_raw_ones_else_the_file(self, tmp_path):
        raw, averaged, path = tiny().state_dict(), DiT(**TINY).state_dict(), tmp_path / "a.pt"
        training = {"model": raw, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/2")}
        for content, expected in [
            (training | {"ema": averaged}, averaged),
            (training, raw),
            (raw, raw),
        ]:
            torch.save(content, path)
            weights = read_published(path)
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], expected[key]) for key in expected)
            DiT(**TINY).load_state_dict(weights, strict=True)

    def test_runs_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (tmp_path.joinpath("ran").touch, ())

        torch.save({"ema": {}, "args": Evil()}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="cannot read .*a.pt"):
            read_published(tmp_path / "a.pt")
        assert not (tmp_path / "ran").exists()

    def test_refuses_what_is_not_there_and_what_are_no_weights(self, tmp_path):
        path = tmp_path / "a.pt"
        with pytest.raises(ValueError, match="cannot read .*a.pt.*No such file"):
            read_published(path)
        for content in ([torch.zeros(1)], {"epoch": 3}):
            torch.save(content, path)
            with pytest.raises(ValueError, match="holds no weights"):
                read_published(path)

    def test_a_command_line_is_allowed_there_only(self, tmp_path):
        torch.save(argparse.Namespace(lr=1), tmp_path / "a.pt")
        with pytest.raises(ValueError, match="holds no weights"):
            read_published(tmp_path / "a.pt")
        assert argparse.Namespace not in torch.serialization.get_safe_globals()
