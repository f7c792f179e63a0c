"""Which items are drawn and what becomes of them."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from expertdiff.data import CIFAR10, Digits
from expertdiff.data.base import Batch, Data, Draw, Shuffled, in_order, permutation
from expertdiff.describe import build, describe


def stream(n=10, batch_size=4, seed=0, rank=0, world_size=1, flip=True, start=0):
    return iter(Shuffled(n, batch_size, seed, rank, world_size, flip, lambda: start))


def take(draws, count):
    return [next(draws) for _ in range(count)]


def attach(data, training=True, rank=0, world_size=1, global_step=0, accumulate=1, seed=0):
    """The part of a trainer that the data look at."""
    data.trainer = SimpleNamespace(
        training=training,
        global_rank=rank,
        world_size=world_size,
        is_global_zero=rank == 0,
        global_step=global_step,
        accumulate_grad_batches=accumulate,
        lightning_module=SimpleNamespace(seeds=[seed]),
    )
    return data


# --- the order ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 3), (3, 8), (12, 4)])
def test_each_epoch_holds_each_item_once(n, batch_size, world_size):
    steps = 4 * n
    ranks = [
        [d.index for d in take(stream(n, batch_size, rank=r, world_size=world_size), steps)]
        for r in range(world_size)
    ]
    # [steps, batch, rank], flattened, is the order of the positions g.
    items = torch.stack([torch.stack(batches) for batches in ranks], dim=-1).flatten()
    epochs = items[: len(items) // n * n].view(-1, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    if n > 5:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > len(epochs) * 0.9


def test_two_ranks_share_what_one_rank_would_have():
    alone = take(stream(50, 8), 20)
    pairs = zip(*(take(stream(50, 4, rank=r, world_size=2), 20) for r in (0, 1)))
    for one, (a, b) in zip(alone, pairs):
        assert set(one.index.tolist()) == {*a.index.tolist(), *b.index.tolist()}


def test_a_stream_from_m_is_the_tail_of_the_stream_from_0():
    whole, tail = (
        take(stream(rank=1, world_size=2), 30),
        take(stream(rank=1, world_size=2, start=17), 13),
    )
    for a, b in zip(whole[17:], tail):
        assert torch.equal(a.index, b.index) and torch.equal(a.flip, b.flip)


def test_seed_rank_and_micro_batch_change_what_is_drawn():
    first = take(stream(1000, 64), 2)
    other = next(stream(1000, 64, seed=1))
    rank = next(stream(1000, 64, rank=1, world_size=2))
    assert not torch.equal(first[0].index, other.index)
    for draw in (first[1], other, rank):
        assert not torch.equal(first[0].flip, draw.flip)


def test_flips_are_fair_and_only_on_request():
    flips = torch.cat([draw.flip for draw in take(stream(1000, 100), 100)])
    assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / 100  # 4 sigma of 10,000 coins
    assert not any(draw.flip.any() for draw in take(stream(flip=False), 20))


def test_permutations_are_uniform_and_fixed_for_ever():
    counts = np.zeros((4, 4))
    for e in range(2000):
        counts[np.arange(4), permutation(4, "test", e)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 3 / 16)
    assert permutation(8, 0, "data", 0).tolist() == [6, 1, 7, 2, 3, 0, 5, 4]


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(stream(), 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n, batch_size, world_size", [(1000, 128, 1), (1000, 128, 3), (9, 4, 2)])
def test_validation_uses_each_image_once_and_in_order(n, batch_size, world_size):
    ranks = [in_order(n, batch_size, r, world_size) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for r, draws in enumerate(ranks):
        assert all(0 < len(draw.index) <= batch_size and not draw.flip.any() for draw in draws)
        assert torch.cat([d.index for d in draws]).tolist() == list(range(r, n, world_size))


def test_validation_of_few_images_loses_and_repeats_none():
    for n, batch_size, world_size in [(5, 1, 2), (1, 4, 3), (7, 2, 5)]:
        drawn = [d.index for r in range(world_size) for d in in_order(n, batch_size, r, world_size)]
        assert sorted(torch.cat(drawn).tolist()) == list(range(n))


# --- batches ---


class Twelve(Digits):
    """The first twelve digits, with all that can be switched on."""

    def read(self, name):
        images, labels = super().read(name)
        return images[:12], labels[:12]


def test_batches_equal_a_plain_loop():
    data = attach(Twelve(batch_size=5, flip=True))
    images, labels = data.split("train")
    loader = iter(data.train_dataloader())
    for draw in take(loader, 6):
        batch = data.on_after_batch_transfer(draw, 0)
        assert isinstance(batch, Batch) and torch.equal(batch.index, draw.index)
        for b, i in enumerate(draw.index.tolist()):
            expected = images[i].numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
            expected = expected[:, :, ::-1] if draw.flip[b] else expected
            assert np.array_equal(batch.x0[b].numpy(), expected)
            assert batch.y[b] == labels[i]
    assert batch.x0.dtype == torch.float32 and batch.x0.shape == (5, 1, 8, 8)
    assert batch.y.dtype == torch.int64


def test_validation_batches_come_from_the_validation_split():
    data = attach(Digits(batch_size=64, validation_samples=100), training=False)
    images, labels = data.split("validation")
    batches = [data.on_after_batch_transfer(draw, 0) for draw in data.val_dataloader()]
    assert torch.equal(torch.cat([b.x0 for b in batches]), data.scaled(images[:100]))
    assert torch.equal(torch.cat([b.y for b in batches]), labels[:100])
    few = attach(Twelve(batch_size=5, validation_samples=100), training=False)
    assert sum(len(draw.index) for draw in few.val_dataloader()) == 12


def test_items_are_moved_once_and_forgotten_at_the_end():
    data = attach(Digits(batch_size=4))
    draw = Draw(torch.tensor([0, 1], device="meta"), torch.tensor([False, True], device="meta"))
    data.on_after_batch_transfer(draw, 0)
    resident = data._on(draw.index.device, "train")[0]
    batch = data.on_after_batch_transfer(draw, 0)
    assert batch.x0.device.type == "meta" and data._on(draw.index.device, "train")[0] is resident
    data.teardown("fit")
    assert data._on(draw.index.device, "train")[0] is not resident


def test_other_batches_pass():
    indices = torch.arange(3)
    assert Digits().on_after_batch_transfer(indices, 0) is indices


# --- in a trainer ---


class Recorder(pl.LightningModule):
    """Learns one number and keeps what it was given."""

    seeds = [7]

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((batch_idx, batch.index.tolist(), batch.x0.sum().item()))
        return (self.weight - batch.x0.mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def predict_step(self, batch, batch_idx):
        return batch

    def sample_batches(self):
        return [torch.arange(2), torch.arange(2, 5)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, max_steps, **kwargs):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        accumulate_grad_batches=3,
        **quiet,
        **kwargs,
    )


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path, recwarn):
    validate = dict(val_check_interval=6, check_val_every_n_epoch=None)
    whole, first, second = Recorder(), Recorder(), Recorder()
    data = dict(batch_size=100, flip=True, validation_samples=150)
    trainer(tmp_path, 8, **validate).fit(whole, Digits(**data))
    half = trainer(tmp_path, 5, **validate)
    half.fit(first, Digits(**data))
    half.save_checkpoint(tmp_path / "half.ckpt")
    ckpt_path = tmp_path / "half.ckpt"
    trainer(tmp_path, 8, **validate).fit(second, Digits(**data), ckpt_path=ckpt_path)
    assert len(whole.trained) == 24 and len(first.trained) == 15
    assert first.trained + second.trained == whole.trained
    epoch = sum((index for _, index, _ in whole.trained[:13]), [])[:1297]
    assert sorted(epoch) == list(range(1297))

    images, _ = Digits().split("validation")
    sanity, validation = whole.validated[:2], whole.validated[2:4]
    for batches in (sanity, validation):
        assert torch.cat([b.index for b in batches]).tolist() == list(range(150))
        assert torch.equal(torch.cat([b.x0 for b in batches]), Digits().scaled(images[:150]))
    assert not [w for w in recwarn if "workers" in str(w.message) or "__len__" in str(w.message)]


def test_a_second_epoch_goes_on_where_the_first_ended(tmp_path):
    limited, whole = Recorder(), Recorder()
    trainer(tmp_path, 4, limit_train_batches=6, limit_val_batches=0).fit(limited, Digits(50))
    trainer(tmp_path, 4, limit_val_batches=0).fit(whole, Digits(50))
    assert [index for _, index, _ in limited.trained] == [index for _, index, _ in whole.trained]


def test_what_test_and_predict_draw_is_the_modules_to_say(tmp_path):
    recorder = Recorder()
    trainer(tmp_path, 1).test(recorder, Digits())
    predicted = trainer(tmp_path, 1).predict(recorder, Digits())
    for batches in (recorder.tested, predicted):
        assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3, 4]]


# --- any data set ---


def test_identity_is_plain_and_tells_data_apart():
    identity = Digits().identity()
    assert identity == Digits(batch_size=3).identity()
    images, labels = Digits().split("train")
    raw = images.numpy().tobytes() + labels.numpy().astype("<i8").tobytes()
    assert identity == {
        "class_path": "expertdiff.data.images.Digits",
        "shape": [1, 8, 8],
        "n": 1297,
        "digest": hashlib.sha256(raw).hexdigest(),
        "scale": "[-1, 1] = uint8 / 127.5 - 1",
        "flip": False,
    }
    assert Twelve().identity()["digest"] != identity["digest"]


def test_described_data_are_built_again():
    data = CIFAR10(root=Path("somewhere"), flip=False, batch_size=3)
    again = build(describe(data), Data)
    assert isinstance(again, CIFAR10) and describe(again) == describe(data)
    assert (again.flip, again.batch_size, again.folder) == (False, 3, data.folder)


def test_reference_is_the_chosen_split():
    assert Digits().split("reference")[0] is not None
    for name in ("train", "validation"):
        data = Digits(reference=name)
        assert data.split("reference")[0] is data.split(name)[0]
    with pytest.raises(ValueError, match="'test' must be one of train, validation"):
        Digits(reference="test").split("reference")


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"validation_samples": 0}])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        Digits(**arguments)
