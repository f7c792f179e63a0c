"""Mixed experts against networks whose weights were mixed by hand."""

import copy
import functools

import pytest
import torch
from torch import nn

from expertdiff.describe import build, describe
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import DDPM, SampleNoise
from expertdiff.experts import mixed
from expertdiff.experts.gated import GatedExperts
from expertdiff.experts.mixed import Mixed
from expertdiff.experts.remixed import Coefficients, OneHot, Raw, RemixDiT, Remixed, Softmax
from expertdiff.experts.routed import RoutedExperts
from expertdiff.experts.stacked import stack
from expertdiff.memory import SMALL, Memory
from expertdiff.networks.dit import DiT
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.networks.network import Network
from expertdiff.networks.unet import ADMUNet

PROCESS = DiscreteVP(LinearBetas())


def dit(**options):
    shape = {"image_size": 8, "in_channels": 3, "size": (2, 16, 2), "num_classes": 5}
    return DiT(**shape | options)


def alive(network):
    """The same network without the zeros that it starts from."""
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return network.eval()


def remixed(diverged=True, plain=None, **options):
    torch.manual_seed(0)
    network = RemixDiT(plain or dit(), **options)
    return alive(network) if diverged else network.eval()


def inputs(n=12):
    g = torch.Generator().manual_seed(1)
    x_t, t = torch.randn(n, 3, 8, 8, generator=g), torch.randint(1000, (n,), generator=g)
    return x_t, t, torch.randint(5, (n,), generator=g)


def explicit(network, i):
    """A plain network of weights that are mixed here, by hand."""
    alpha = network.coefficients.weight.softmax(-1)[i]
    plain = dit().eval()
    weights = {key: network.state_dict()[key] for key in plain.state_dict()}
    for key in weights:
        if any(part in key for part in (".attn.", ".mlp.")) and "t_embedder" not in key:
            weights[key] = sum(a * basis for a, basis in zip(alpha.detach(), weights[key]))
    plain.load_state_dict(weights)
    return plain


# What it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, bases, experts, total, basis, shared",
    [
        ("S", 4, 20, 96_788_848, 21_275_136, 11_589_920),
        ("S", 8, 20, 32_963_360 + 7 * 21_275_136 + 160, 21_275_136, 11_589_920),
        ("B", 4, 20, 385_565_296, 85_017_600, 45_298_208),
        ("L", 4, 20, 1_364_736_112, 302_211_072, 155_629_600),
        ("XL", 4, 20, 2_013_721_456, 446_197_248, 228_637_472),
    ],
)
def test_the_published_sizes_to_the_parameter(size, bases, experts, total, basis, shared):
    with torch.device("meta"):
        network = RemixDiT(DiT(size=size), bases=bases, experts=experts)
    stacks = network.stacks()
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(stack.numel() for stack in stacks.values()) == bases * basis
    others = [p for name, p in network.named_parameters() if name not in stacks and p.requires_grad]
    assert sum(p.numel() for p in others) == shared + bases * experts


def test_keys_are_those_of_the_plain_network_with_a_leading_axis():
    plain, network = dit(), remixed(bases=3)
    ours = network.state_dict()
    assert list(ours) == [*plain.state_dict(), "coefficients.weight"]
    assert list(ours) == [name for name, _ in network.named_parameters()]
    for key, value in plain.state_dict().items():
        mixed = (
            any(f".{part}." in key for part in ("qkv", "proj", "fc1", "fc2")) and "blocks" in key
        )
        assert ours[key].shape == ((3, *value.shape) if mixed else value.shape), key
    assert ours["coefficients.weight"].shape == (20, 3)
    assert not network.pos_embed.requires_grad


def test_each_basis_is_drawn_as_the_plain_network():
    stack = remixed(diverged=False, plain=dit(size=(2, 64, 2))).blocks[1].attn.qkv.weight
    bound = (6 / (64 + 192)) ** 0.5  # Xavier's, of the matrix and not of the stack
    for basis in stack:
        assert basis.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert basis.abs().max() <= bound
    assert all(not torch.equal(stack[0], other) for other in stack[1:])


def test_the_seed_decides_all_first_weights():
    assert all(torch.equal(*pair) for pair in zip(remixed().parameters(), remixed().parameters()))


def test_it_can_be_written_down_and_built_again():
    network = remixed(bases=2, experts=5, mixer=Raw(), scope="local")
    again = build(describe(network), Network)
    again.load(network.state_dict())
    assert describe(again) == describe(network)
    assert torch.equal(again.eval()(*inputs()), network(*inputs()))


def test_a_fresh_one_outputs_0_like_a_fresh_dit():
    assert remixed(diverged=False)(*inputs()).abs().max() == 0


# Who acts where -----------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [n for n in range(1, 1001) if 1000 % n == 0])
def test_owners_are_integer_quotients(experts):
    partition = Partition([n / experts for n in range(experts + 1)])
    t = torch.arange(1000)
    assert torch.equal(partition.index((t + 1).double() / 1000), t // (1000 // experts))


def test_uneven_intervals_own_every_t_once():
    network = remixed(experts=12)
    steps = [list(interval.steps(1000)) for interval in network.partition.intervals()]
    assert sorted(sum(steps, [])) == list(range(1000))
    t = torch.arange(1000)
    owner = network.partition.index((t + 1).double() / 1000)
    assert all((owner[part] == i).all() for i, part in enumerate(steps))


def test_a_mixed_batch_is_what_its_items_are_alone():
    network, (x_t, t, y) = remixed(experts=7), inputs(24)
    together = network(x_t, t, y)
    alone = [network(x_t[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(24)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    by_hand = [explicit(network, s * 7 // 1000)(x, s[None], c[None])
               for x, s, c in zip(x_t[:, None], t, y)]  # fmt: skip
    assert torch.allclose(together, torch.cat(by_hand), atol=1e-5)


def test_an_unlabelled_batch_is_grouped_too():
    network, (x_t, t, _) = remixed(plain=dit(num_classes=None), experts=7), inputs()
    alone = [network(x_t[i : i + 1], t[i : i + 1]) for i in range(12)]
    assert torch.allclose(network(x_t, t), torch.cat(alone), atol=1e-5)


def test_the_active_expert_is_not_asked_of_t():
    network, (x_t, t, y) = remixed(), inputs()
    network.active = 3
    assert torch.allclose(network(x_t, t, y), explicit(network, 3)(x_t, t, y), atol=1e-6)


def test_exported_experts_behind_a_route_are_the_same_model():
    network = remixed(bases=2, experts=3)
    experts = [dit() for _ in range(3)]
    for expert, weights in zip(experts, network.export_experts()):
        expert.load_state_dict(weights)
    routed = RoutedExperts(
        [NetworkDenoiser(e.eval(), PROCESS, Eps()) for e in experts], network.partition
    )
    ours = NetworkDenoiser(network, PROCESS, Eps())
    assert torch.allclose(ours(*inputs()).eps, routed(*inputs()).eps, atol=1e-6)


# Mixing -------------------------------------------------------------------------------------------


def test_outputs_and_gradients_are_those_of_weights_mixed_by_hand():
    network, (x_t, _, y) = remixed(), inputs()
    t = torch.full((12,), 730)  # of expert 14
    alpha = network.coefficients.weight.softmax(-1)[14].detach()
    plain = explicit(network, 14)
    ours, theirs = network(x_t, t, y), plain(x_t, t, y)
    assert torch.allclose(ours, theirs, atol=1e-6)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    slope = torch.zeros(4)
    for name, p in plain.named_parameters():
        if not p.requires_grad:
            continue
        mine = network.get_parameter(name)
        if name in network.stacks():
            for a, grad in zip(alpha, mine.grad):
                assert torch.allclose(grad, a * p.grad, atol=1e-6), name
            slope += ((mine.detach() - p.detach()) * p.grad).flatten(1).sum(1)
        else:
            assert torch.allclose(mine.grad, p.grad, atol=1e-6), name
    table = network.coefficients.weight.grad
    assert torch.allclose(table[14], alpha * slope, atol=1e-6) and slope.abs().max() > 1e-4
    assert table[[i for i in range(20) if i != 14]].abs().max() == 0


@pytest.fixture
def no_code(monkeypatch):
    """Compiles without a compiler: what PyTorch reads of the Python, it runs as it is."""
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    mixed._compiled.cache_clear()
    torch._dynamo.reset()  # or a test would come to the limit of what is compiled for another
    yield
    mixed._compiled.cache_clear()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["", "alpha", "a stack"])
def test_derivatives_of_the_mixture(frozen, compiled, no_code):
    shapes = [(3,), (3, 2, 5), (3,), (3, 4)]
    inputs = [torch.randn(shape, dtype=torch.double) for shape in shapes]
    for i, x in enumerate(inputs):
        x.requires_grad_(i != frozen)

    def mix(alpha, *stacks):
        weights = Mixed.apply(alpha, Memory(), [torch.double] * 3, compiled, *stacks)
        return weights[:2]  # one is not used

    assert torch.autograd.gradcheck(mix, inputs)
    for weight, bases in zip(mix(*inputs), inputs[1:]):
        assert torch.allclose(weight, torch.tensordot(inputs[0], bases, dims=1))
    assert mixed._compiled.cache_info().currsize == 2 * compiled


def test_compiled_it_is_the_same(no_code):
    plain, compiled = (remixed(plain=dit(compiled=compiled)) for compiled in (False, True))
    outputs = []
    for network in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(network(*inputs()))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs)
    for p, q in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    assert mixed._compiled.cache_info().currsize == 2


def test_steps_share_memory_and_what_is_kept_of_one_is_not_written_over():
    network, (x_t, _, y) = remixed(plain=dit(size=(1, 192, 2))), inputs()
    stacks = [stack for stack in network.stacks().values() if 4 * stack.numel() > SMALL]

    def step(*experts):
        network.zero_grad()
        t = torch.tensor([50 * expert for expert in experts]).repeat(12 // len(experts))
        network(x_t, t, y).square().mean().backward()
        return [stack.grad for stack in stacks]

    def places():
        return {stack.grad.data_ptr() for stack in stacks}

    held = step(3)
    copied, before = [x.clone() for x in held], places()
    step(4, 5, 4, 9)
    assert not places() & before
    assert all(torch.equal(x, y) for x, y in zip(held, copied))
    del held
    network.zero_grad()
    again, now = step(3), places()
    assert all(torch.equal(x, y) for x, y in zip(again, copied))
    del again
    step(3)
    assert places() == now


def test_blocks_that_are_recomputed_have_the_same_gradients():
    x_t, t, y = inputs()
    gradients = []
    for checkpointing in (False, True):
        network = remixed(plain=dit(checkpointing=checkpointing)).train()
        torch.manual_seed(2)  # of the labels that are dropped
        network(x_t, t, y).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-6)


def test_equal_bases_do_not_move_the_logits():
    network = remixed(diverged=False)
    network.start_from(alive(dit()).state_dict())
    network(*inputs()).square().mean().backward()
    assert network.coefficients.weight.grad.abs().max() < 1e-6
    assert network.blocks[0].attn.qkv.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("logits", ["first", "random", "sharp"])
def test_from_a_plain_network_all_softmaxes_are_that_network(logits):
    plain, network = alive(dit()), remixed(diverged=False, experts=13)
    network.start_from(plain.state_dict())
    if logits != "first":
        with torch.no_grad():
            network.coefficients.weight.normal_(std=1 if logits == "random" else 30)
    for t in torch.arange(0, 1000, 37).split(9):
        x_t, _, y = inputs(len(t))
        assert torch.allclose(network(x_t, t, y), plain(x_t, t, y), atol=1e-5)
    for weights in network.export_experts():
        for key, value in plain.state_dict().items():
            assert torch.allclose(weights[key], value, atol=1e-6), key


def test_one_basis_of_one_expert_is_the_plain_network():
    plain, network = alive(dit()), remixed(bases=1, experts=1)
    assert network.coefficients.weight.isfinite().all()
    network.start_from(plain.state_dict())
    assert torch.equal(network(*inputs()), plain(*inputs()))


@pytest.mark.parametrize("alternate", [False, True], ids=["together", "in turn"])
def test_one_hot_with_as_many_bases_is_as_many_networks_step_by_step(alternate):
    """All mixed; an expert that is not asked gets gradients of 0, as its basis does."""
    torch.manual_seed(0)
    network = Remixed(
        MLPDenoiser(16, 2, T=1000), mixed=["network"], bases=3, experts=3, mixer=OneHot()
    )
    assert len(list(network.named_parameters())) == 1 + len(network.stacks())
    experts = nn.ModuleList(MLPDenoiser(16, 2, T=1000) for _ in range(3))
    for expert, weights in zip(experts, network.export_experts()):
        expert.load_state_dict(weights)
    ours = torch.optim.AdamW(network.parameters(), lr=1e-2)
    theirs = [torch.optim.AdamW(e.parameters(), lr=1e-2) for e in experts]
    for step in range(6):
        x_t, u = torch.randn(12, 2), torch.rand(12)
        t = ((step % 3 if alternate else torch.arange(12) % 3) + u) * 333
        owner, t = (t / (1000 / 3)).long(), t.long()
        assert torch.equal(owner, network.partition.index((t + 1).double() / 1000))
        ours.zero_grad()
        (network(x_t, t) - 1).square().mean().backward()
        ours.step()
        for i, (expert, optimizer) in enumerate(zip(experts, theirs)):
            optimizer.zero_grad()
            error = expert(x_t, t) - 1
            error[owner == i].square().sum().div(24).backward()
            optimizer.step()
    for expert, weights in zip(experts, network.export_experts()):
        for key, value in expert.state_dict().items():
            assert torch.allclose(weights[key], value, atol=1e-6), key


@pytest.mark.parametrize(
    "plain, mixed, shape",
    [
        (GatedExperts(width=8, depth=1, T=1000), ["0", "ff"], (2,)),
        (ADMUNet(8, 1, model_channels=8, num_res_blocks=1, channel_mult=(1, 2),
                 attention_resolutions=(4,), num_head_channels=8, learn_sigma=False),
         ["in_layers.2", "qkv", "out_layers.0"], (1, 8, 8)),
    ],
    ids=["gated", "unet"],
)  # fmt: skip
def test_any_network_can_be_mixed(plain, mixed, shape):
    network = alive(Remixed(plain, mixed, bases=2, experts=4))
    for module in (network, NetworkDenoiser(network, PROCESS, Eps())):
        module.to(memory_format=torch.channels_last)  # on a GPU training and teachers do this
    x_t, t = torch.randn(9, *shape), torch.randint(1000, (9,))
    for i, weights in enumerate(network.export_experts()):
        plain.load_state_dict(weights)
        mine = t // 250 == i
        assert torch.allclose(network(x_t, t)[mine], plain.eval()(x_t[mine], t[mine]), atol=1e-5)


def test_a_copy_has_weights_of_its_own():
    network = remixed()
    twin = copy.deepcopy(network)
    before = network(*inputs())
    alive(twin)
    assert torch.equal(network(*inputs()), before)
    assert not torch.allclose(twin(*inputs()), before, atol=1e-3)
    weights = twin.expert(0)
    assert torch.equal(weights["pos_embed"], twin.pos_embed)


class OneMoreInTraining(MLPDenoiser):
    def forward(self, x_t, t, y=None):
        return super().forward(x_t, t) + self.training


def test_training_mode_reaches_the_plain_network():
    network = Remixed(OneMoreInTraining(8, 1, T=1000), ["ff"])
    x_t, t = torch.randn(4, 2), torch.zeros(4).long()
    assert torch.allclose(network.train()(x_t, t) - 1, network.eval()(x_t, t), atol=1e-6)


EVERYTHING = [
    "x_embedder", "t_embedder", "y_embedder", "blocks.0", "blocks.1", "final_layer",
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"mixed": EVERYTHING}], ids=["default", "everything"])
def test_autocast_computes_in_the_numbers_of_the_plain_network(options):
    network = remixed(**options)
    x_t, _, y = inputs()
    t = torch.full((12,), 999)
    plain = dit().eval()
    plain.load_state_dict(network.expert(19))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x_t, t, y), plain(x_t, t, y))
        weights = network.mix(19)
        assert weights["blocks.1.mlp.fc2.weight"].dtype == torch.bfloat16
        assert weights["blocks.1.mlp.fc2.bias"].dtype == torch.float32
        assert {w.dtype for w in network.expert(19).values()} == {torch.float32}


def test_one_hot_with_everything_mixed_is_routed_experts():
    network = remixed(mixed=EVERYTHING, bases=3, experts=3, mixer=OneHot())
    experts = [dit() for _ in range(3)]
    for k, expert in enumerate(experts):
        shared = {"pos_embed": network.pos_embed}
        bases = {name: stack[k] for name, stack in network.stacks().items()}
        expert.load_state_dict(shared | bases)
    routed = RoutedExperts(
        [NetworkDenoiser(e.eval(), PROCESS, Eps()) for e in experts], network.partition
    )
    ours = NetworkDenoiser(network, PROCESS, Eps())
    assert torch.allclose(ours(*inputs()).eps, routed(*inputs()).eps, atol=1e-6)


# The table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases, experts", [(4, 20), (8, 20), (2, 20), (4, 4), (3, 7)])
def test_the_prior_gives_each_basis_a_run_of_experts(bases, experts):
    prior = remixed(bases=bases, experts=experts).coefficients.prior
    expected = [n * bases // experts for n in range(experts)]
    assert prior.argmax(1).tolist() == expected and (prior.sum(1) == 1).all()
    assert set(expected) == set(range(bases))
    if experts % bases == 0:
        repeated = torch.arange(bases).repeat_interleave(experts // bases)
        assert torch.equal(prior.argmax(1), repeated)


def test_most_of_the_first_mass_is_on_the_prior():
    torch.manual_seed(0)
    tables = [Coefficients(20, 4, None, Softmax()) for _ in range(200)]
    mass = torch.stack([(c() * c.prior).sum(1).mean() for c in tables]).mean()
    assert mass.item() == pytest.approx(0.78, abs=0.01)


def test_distances_of_the_mixers():
    table, prior = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    two, e2 = torch.tensor(2.0), torch.tensor(2.0).exp()
    assert torch.isclose(Softmax().distance(table, prior), (two.log() + (1 + e2).log()) / 2)
    assert Raw().distance(table, prior) == (1 + 9 + 0) / 4
    assert OneHot().distance(table, prior) == 0


def test_raw_rows_begin_with_sum_1_and_one_hot_ones_stay():
    raw, hot = remixed(False, mixer=Raw()).coefficients, remixed(False, mixer=OneHot()).coefficients
    assert torch.allclose(raw().sum(1), torch.ones(20)) and raw.weight.requires_grad
    assert torch.equal(hot(), hot.prior) and not hot.weight.requires_grad


def test_a_local_table_is_one_a_block():
    network = remixed(scope="local", bases=2, experts=3)
    assert network.coefficients.weight.shape == (2, 3, 2)
    alpha, weights = network.coefficients(), network.expert(1)
    for block in (0, 1):
        for part in ("attn.qkv.weight", "mlp.fc2.bias"):
            one, other = network.get_parameter(key := f"blocks.{block}.{part}")
            expected = alpha[block, 1, 0] * one + alpha[block, 1, 1] * other
            assert torch.allclose(weights[key], expected, atol=1e-6)
    network(*inputs()).square().mean().backward()
    assert (network.coefficients.weight.grad.abs().amax((1, 2)) > 0).all()


# The kept expert ----------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    calls, mix = [], Remixed.mix
    monkeypatch.setattr(Remixed, "mix", lambda self, i: calls.append(i) or mix(self, i))
    return calls


def test_a_chain_of_250_steps_mixes_each_expert_once(counted):
    network = remixed(plain=dit(size=(1, 8, 1), patch_size=8, num_classes=None, learn_sigma=False))
    denoiser, noise = (
        NetworkDenoiser(network, PROCESS, Eps()),
        SampleNoise(0, [0, 1], (3, 8, 8), "cpu"),
    )
    kept = DDPM(250)(denoiser, noise)
    assert counted == list(range(19, -1, -1))
    network._weights = network.mix
    assert torch.equal(DDPM(250)(denoiser, noise), kept)
    assert len(counted) == 20 + 250


@torch.no_grad()
def test_any_change_of_the_weights_is_noticed(counted):
    network = remixed()
    x_t, _, y = inputs()
    t = torch.zeros(12).long()

    def is_fresh(change):
        before = network(x_t, t, y)
        mixed = len(counted)
        network(x_t, t, y)
        assert len(counted) == mixed  # still kept
        change()
        after = network(x_t, t, y)
        return len(counted) == mixed + 1 and not torch.equal(before, after)

    stack, table = network.blocks[1].mlp.fc2.weight, network.coefficients.weight
    network.requires_grad_()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    assert is_fresh(torch.optim.AdamW(network.parameters(), lr=0.1).step)
    fused = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)

    @torch.enable_grad()
    def trained():
        network(x_t, t, y).square().mean().backward()
        fused.step()
        counted.pop()

    assert is_fresh(trained)
    assert is_fresh(lambda: table.mul_(0))
    weights = {key: value + 0.1 for key, value in network.state_dict().items()}
    assert is_fresh(lambda: network.load_state_dict(weights))
    average = torch.randn_like(stack)
    assert is_fresh(lambda: setattr(stack, "data", average))  # as the average is exchanged
    with torch.autocast("cpu", torch.bfloat16):
        mixed = len(counted)
        network(x_t, t, y)
        assert len(counted) == mixed + 1


def test_nothing_is_kept_in_training():
    network = remixed()
    network.train()
    network(*inputs())
    with torch.no_grad():
        network(*inputs())
    network.eval()(*inputs())
    assert network._kept is None


# First weights from elsewhere ---------------------------------------------------------------------


def test_it_starts_where_one_of_its_kind_stands():
    network, other = remixed(), remixed()
    alive(other)
    network.start_from(other.state_dict())
    assert torch.equal(network(*inputs()), other(*inputs()))
    assert torch.equal(network.coefficients.weight, other.coefficients.weight)


def test_weights_that_do_not_fit_are_named():
    network = remixed()
    with pytest.raises(ValueError, match=r"coefficients.weight is \(8, 2\) instead of \(20, 4\)"):
        network.start_from(remixed(experts=8, bases=2).state_dict())
    with pytest.raises(
        ValueError, match=r"\(2, 20, 4\) instead of \(20, 4\): set experts, bases and"
    ):
        network.start_from(remixed(scope="local").state_dict())
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.qkv.weight is .*96, 32\) instead .*48, 16\)"
    ):
        wide = dit(size=(2, 32, 2)).state_dict()
        shared = {k: v for k, v in network.state_dict().items() if k not in network.stacks()}
        network.start_from(wide | {k: v for k, v in shared.items() if k in wide})
    with pytest.raises(ValueError, match=r"blocks.2.adaLN_modulation.1.bias \(96,\) is left over"):
        network.start_from(dit(size=(3, 16, 2)).state_dict())


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": 1001}, "1001 experts cannot share 1000 timesteps"),
        ({"experts": 3}, "3 experts of 4 bases: give 1 basis or more, and no fewer experts"),
        ({"bases": 0}, "20 experts of 0 bases"),
        ({"mixed": ["attn.kqv"]}, "no module with parameters in DiT .* ends with 'attn.kqv'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        remixed(**options)


def test_other_times_and_side_by_side_are_refused():
    with pytest.raises(ValueError, match="made for 100 timesteps, not 1000"):
        Remixed(MLPDenoiser(T=100), ["ff"])
    with pytest.raises(ValueError, match="integer timesteps, not t of torch.float32"):
        remixed()(*inputs()[:1], torch.rand(12), inputs()[2])
    with pytest.raises(ValueError, match="RemixDiT cannot be trained stacked"):
        stack([remixed(), remixed()])
