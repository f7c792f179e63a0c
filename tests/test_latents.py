"""Latents: encoded once, kept, drawn from, trained on and decoded."""

import errno
import json
import multiprocessing
import os
import shutil
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from expertdiff import files
from expertdiff.bundle import Bundle
from expertdiff.cli import main, run_verb
from expertdiff.data import Digits
from expertdiff.data.base import Data, Draw, Shuffled, Stacked
from expertdiff.data.latents import DiffusersKL, Latents, Tiny, latents, store, verb
from expertdiff.data.latents.store import Store
from expertdiff.data.latents.verb import centre_crop
from expertdiff.describe import build, describe
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.evaluation.kinds import kind
from expertdiff.image_files import load_npz
from expertdiff.methods.stitched import Evaluation, Stitched
from expertdiff.verbs import likelihood

SIZE, SHIFT = 16, 0.25


def save_kl(folder, seed=0):
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=SHIFT,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with kl, another (of other weights) and tiny: 16 x 16 pixels to 4 x 8 x 8."""
    root = tmp_path_factory.mktemp("weights")
    save_kl(root / "kl")
    save_kl(root / "another", seed=1)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(root / "tiny")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures of two classes to train, five to validate, all different, of several sizes."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 5)):
        for i in range(n):
            path = root / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = draw.integers(SIZE, 3 * SIZE, 2)
            coarse = draw.integers(0, 256, (3, 3, 3), np.uint8)
            Image.fromarray(coarse).resize((width, height)).save(path)
    return root


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(verb, "BLOCK", 4)


@pytest.fixture(scope="module")
def made(pictures, weights, tmp_path_factory):
    """A finished store of kl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "BLOCK", 4)
        return make(pictures, tmp_path_factory.mktemp("made") / "store", weights)


def make(images, output, weights, name="kl", **options):
    autoencoder = (Tiny if name == "tiny" else DiffusersKL)(weights / name)
    latents(images, output, autoencoder, SIZE, **({"batch_size": 3} | options))
    return output


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".json")}


def attach(data, training=True, rank=0):
    """The part of a trainer that the data look at."""
    data.trainer = SimpleNamespace(
        training=training,
        global_rank=rank,
        world_size=2,
        global_step=0,
        accumulate_grad_batches=1,
        lightning_module=SimpleNamespace(seeds=[7]),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def batches(data, draws):
    """What a network is given of these draws."""
    steps = (data.on_before_batch_transfer(draw, 0) for draw in draws)
    return [data.on_after_batch_transfer(step, 0) for step in steps]


# --- autoencoders ---


def test_an_autoencoder_is_that_of_diffusers(weights):
    ours, images = DiffusersKL(weights / "kl"), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    theirs = diffusers.AutoencoderKL.from_pretrained(weights / "kl")
    posterior = theirs.encode(images).latent_dist
    for a, b in zip(ours.moments(images), (posterior.mean, posterior.std)):
        assert torch.allclose(a, b, atol=1e-6) and a.shape == (2, 4, 8, 8)
    assert (ours.scale, ours.shift) == (0.18215, SHIFT)
    x0 = torch.randn(20, 4, 8, 8)
    expected = torch.cat([theirs.decode(z[None] / 0.18215 + SHIFT).sample for z in x0])
    assert torch.allclose(ours.decode(x0), expected.clamp(-1, 1), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # decoded in float32 whatever the precision
        assert torch.equal(ours.decode(x0), DiffusersKL(weights / "kl").decode(x0))


def test_a_tiny_autoencoder_has_no_posterior(weights):
    ours, images = Tiny(weights / "tiny"), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    mean, std = ours.moments(images)
    theirs = diffusers.AutoencoderTiny.from_pretrained(weights / "tiny")
    assert torch.allclose(mean, theirs.encode(images).latents, atol=1e-6) and not std.any()
    expected = theirs.decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(ours.decode(mean), expected, atol=1e-6)
    assert (ours.scale, ours.shift) == (1, 0)


def test_an_autoencoder_is_its_weights_not_its_place(weights, tmp_path):
    shutil.copytree(weights / "kl", tmp_path / "copy")
    ours = DiffusersKL(weights / "kl")
    assert DiffusersKL(tmp_path / "copy", scale=2).identity == ours.identity
    assert DiffusersKL(weights / "another").identity != ours.identity


def test_a_description_is_good_from_anywhere(weights, monkeypatch, tmp_path):
    monkeypatch.chdir(weights)
    told = DiffusersKL("kl", shift=3).description
    monkeypatch.chdir(tmp_path)
    again = build(told, DiffusersKL)
    assert describe(again) == told and (again.scale, again.shift) == (0.18215, 3)
    assert again.identity == DiffusersKL(weights / "kl").identity


def test_autoencoders_that_cannot_be_loaded(weights, tmp_path, monkeypatch):
    images = torch.zeros(1, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"nowhere as AutoencoderKL .*: give a folder with"):
        DiffusersKL(tmp_path / "nowhere").moments(images)
    with pytest.raises(ValueError, match=r"kl as AutoencoderTiny \(it is a AutoencoderKL\)"):
        Tiny(weights / "kl").moments(images)
    pickled = tmp_path / "pickled"
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    ).save_pretrained(pickled, safe_serialization=False)
    with pytest.raises(ValueError, match=r"pickled as AutoencoderTiny .*safetensors"):
        Tiny(pickled).moments(images)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'expertdiff\[latents\]'"):
        Tiny(weights / "tiny").moments(images)


# --- the store ---


def test_pictures_are_halved_by_boxes_then_resized_and_cut():
    values = np.random.default_rng(0).integers(0, 256, (32, 48), np.uint8)
    wide = Image.fromarray(values).convert("RGB")
    boxes = values.reshape(16, 2, 24, 2).astype(float).mean((1, 3))
    ours = centre_crop(wide, 16)
    assert ours.shape == (3, 16, 16) and np.abs(ours[1] - boxes[:, 4:20]).max() <= 1
    quarter = boxes.reshape(8, 2, 12, 2).mean((1, 3))  # halved twice, rounded each time
    assert np.abs(centre_crop(wide, 8)[0] - quarter[:, 2:10]).max() <= 2
    smaller = wide.resize((36, 24), Image.Resampling.BICUBIC)  # no halving: 32 < 2 * 24
    assert np.array_equal(centre_crop(wide, 24), np.asarray(smaller)[:, 6:30].transpose(2, 0, 1))
    assert centre_crop(Image.new("RGB", (5, 7)), 16).shape == (3, 16, 16)  # enlarged


def test_a_store_holds_what_the_autoencoder_makes(made, pictures, weights):
    data, autoencoder = Latents(made), DiffusersKL(weights / "kl")
    assert data.shape == (4, 8, 8) and data.class_names == ("cat", "dog") and data.num_classes == 2
    for split, folder, n in (("train", "train", 10), ("validation", "val", 5)):
        moments, labels = data.split(split)
        images = data.real(split)
        assert moments.shape == (n, 2, 2, 4, 8, 8) and moments.dtype == torch.float16
        paths = sorted((pictures / folder).rglob("*.png"))
        cut = {centre_crop(Image.open(path), SIZE).tobytes(): path for path in paths}
        found = [cut[image.numpy().tobytes()] for image in images]
        assert sorted(found) == paths  # each once
        assert [data.class_names[label] for label in labels] == [p.parent.name for p in found]
        x = images.float() / 127.5 - 1
        for flip, seen in enumerate((x, x.flip(-1))):
            mean, std = autoencoder.moments(seen)
            assert torch.allclose(moments[:, flip, 0].float(), mean, rtol=2**-10, atol=1e-4)
            assert torch.allclose(moments[:, flip, 1].float(), std, rtol=2**-10, atol=1e-4)
    x0 = data.scaled(data.split("train")[0])
    mean, _ = autoencoder.moments(data.real("train").float() / 127.5 - 1)
    assert torch.allclose(x0, (mean - SHIFT) * 0.18215, rtol=2**-10, atol=1e-4)


def test_a_store_can_be_read_without_us(made):
    moments = np.load(made / "train.npy", allow_pickle=False)
    assert moments.shape == (10, 2, 2, 4, 8, 8)
    assert np.array_equal(moments, Store.open(made).moments("train", verified=True))
    told = json.loads((made / "store.json").read_text())
    assert told["scale"].keys() == {"factor", "shift", "autoencoder"}
    assert told["splits"]["validation"]["n"] == 5 and told["image_size"] == SIZE


def test_32_bits_on_request(pictures, weights, tmp_path, made):
    data = Latents(make(pictures, tmp_path / "a", weights, half=False))
    moments = data.split("train")[0]
    assert moments.dtype == torch.float32
    assert torch.equal(moments.half(), Latents(made).split("train")[0])
    assert data.identity()["digest"] != Latents(made).identity()["digest"]


class FewDigits(Digits):
    """Grey, 8 x 8 pixels."""

    def read(self, name):
        images, labels = super().read(name)
        return images[:6], labels[:6]


def test_latents_of_a_data_set_keep_its_order_and_classes(weights, tmp_path):
    digits, data = FewDigits(), Latents(make(FewDigits(), tmp_path / "a", weights, "tiny"))
    assert data.num_classes == 10 and data.class_names == Digits.class_names
    assert torch.equal(data.split("train")[1], digits.split("train")[1])
    for ours, theirs in zip(data.real("train"), digits.split("train")[0]):
        enlarged = Image.fromarray(theirs[0].numpy()).resize((SIZE, SIZE), Image.BICUBIC)
        assert all(np.array_equal(channel, enlarged) for channel in ours)


def test_the_first_pictures_are_kept(pictures, weights, tmp_path, monkeypatch, made):
    monkeypatch.setattr(verb, "KEPT", 6)
    data = Latents(make(pictures, tmp_path / "a", weights))
    assert torch.equal(data.real("train"), Latents(made).real("train")[:6])
    assert len(data.real("reference")) == 5


@pytest.mark.parametrize("moment", ["while encoding", "before the record"])
def test_a_killed_run_goes_on_where_it_stopped(moment, made, pictures, weights, tmp_path, capsys):
    calls = []

    def killed(function):
        def until(*args):
            calls.append(1)
            if len(calls) > 4:
                raise KeyboardInterrupt
            return function(*args)

        return until

    with pytest.MonkeyPatch.context() as patch:
        if moment == "while encoding":
            patch.setattr(DiffusersKL, "moments", killed(DiffusersKL.moments))
        else:
            patch.setattr(store, "write_json", killed(store.write_json))
        with pytest.raises(KeyboardInterrupt):
            make(pictures, tmp_path / "a", weights)
    left = len(list((tmp_path / "a/blocks").glob("*.json")))
    assert 0 < left < 5
    with pytest.raises(ValueError, match=r"a is not finished: run .* again"):
        Latents(tmp_path / "a").split("train")
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "encoded", lambda *args, f=verb.encoded: (calls.append(1), f(*args))[1])
        make(pictures, tmp_path / "a", weights)
    assert len(calls) == 5 - left  # blocks of 4 pictures: 3 of 10 and 2 of 5
    assert contents(tmp_path / "a") == contents(made)
    assert "(10 for train, 5 for validation)" in capsys.readouterr().out


def test_several_processes_make_one_store(made, pictures, weights, tmp_path):
    def run(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        make(pictures, tmp_path / "a", weights)

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert contents(tmp_path / "a") == contents(made)


def test_one_of_several_processes_leaves_the_others_their_share(
    pictures, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    make(pictures, tmp_path / "a", weights)
    assert len(list((tmp_path / "a/blocks").glob("*.json"))) == 2
    assert "rank 1 is done" in capsys.readouterr().out


def test_a_damaged_block_is_refused_and_made_again(made, pictures, weights, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    raw = bytearray((folder / "train.npy").read_bytes())
    raw[-5] ^= 1
    (folder / "train.npy").write_bytes(raw)
    with pytest.raises(ValueError, match=r"train\.npy is damaged from row 8 on: remove .*00000008"):
        Latents(folder).split("train")
    (folder / "store.json").unlink()
    (folder / "blocks/train-00000008.json").unlink()
    assert contents(make(pictures, folder, weights)) == contents(made)


@pytest.mark.parametrize("name", ["train", "train-labels", "validation-images"])
def test_damaged_files_are_named(name, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    data, path = Latents(folder, resident=name == "train"), folder / f"{name}.npy"
    look = data.real if "images" in name else data.split
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name}.npy is damaged"):
        look(name.partition("-")[0])
    path.write_bytes(raw[:-20])
    with pytest.raises(ValueError, match=f"cannot read .*{name}.npy"):
        look(name.partition("-")[0])
    path.unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{name}.npy"):
        look(name.partition("-")[0])


def test_a_store_without_scale_is_refused(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    told = json.loads((folder / "store.json").read_text())
    for scale in ({}, None, {"factor": 0.18215}, 0.18215):
        (folder / "store.json").write_text(json.dumps(told | {"scale": scale}))
        with pytest.raises(ValueError, match="does not say the scale of its latents"):
            Latents(folder).identity()
    (folder / "store.json").write_text("[]")
    with pytest.raises(ValueError, match="another format"):
        Latents(folder).identity()
    with pytest.raises(ValueError, match="holds no latents: make them with"):
        Latents(tmp_path).identity()


def test_a_folder_of_something_else_is_left_alone(made, pictures, weights, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"a holds other latents \(.*scale"):
        make(pictures, folder, weights, "another")
    with pytest.raises(ValueError, match="holds something else than latents"):
        make(pictures, pictures, weights)
    assert contents(folder) == before and not (pictures / "plan.json").exists()


def test_pictures_that_have_changed_are_others(made, pictures, weights, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    changed = shutil.copytree(pictures, tmp_path / "pictures")
    Image.new("RGB", (SIZE, SIZE)).save(changed / "train/cat/0.png")
    with pytest.raises(ValueError, match="a holds other latents"):
        make(changed, folder, weights)


def test_bad_arguments(pictures, weights, tmp_path):
    with pytest.raises(ValueError, match="image_size 0 and batch_size 3 must be at least 1"):
        latents(pictures, tmp_path / "a", DiffusersKL(weights / "kl"), 0, 3)
    with pytest.raises(ValueError, match="image_size 15 do not come back"):
        latents(pictures, tmp_path / "a", DiffusersKL(weights / "kl"), 15)
    with pytest.raises(ValueError, match="nowhere is not there"):
        make(tmp_path / "nowhere", tmp_path / "a", weights)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_costs_one_block(made, pictures, weights, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        patch.setattr(files, "_sync", lambda path: None)
        with pytest.raises(
            ValueError, match=r"cannot write .*train.npy \(No space left.* GiB of room"
        ):
            make(pictures, tmp_path / "a", weights)
    assert contents(make(pictures, tmp_path / "a", weights)) == contents(made)


def test_values_beyond_16_bits_are_refused(pictures, weights, tmp_path, monkeypatch):
    moments = Tiny.moments
    monkeypatch.setattr(Tiny, "moments", lambda *args: [m + 1e5 for m in moments(*args)])
    with pytest.raises(ValueError, match="not finite in float16: set half to false"):
        make(pictures, tmp_path / "a", weights, "tiny")


def test_the_verb_from_the_command_line(pictures, weights, tmp_path, made):
    options = ["--output", tmp_path / "a", "--autoencoder=DiffusersKL", "--batch_size=3"]
    options += [f"--autoencoder.path={weights / 'kl'}", f"--image_size={SIZE}"]
    run_verb(latents, [str(word) for word in (pictures, *options)])
    assert contents(tmp_path / "a") == contents(made)


# --- what is drawn ---


def stream(data, m=0, rank=0, seeds=(7,)):
    orders = (Shuffled(10, 4, s, rank, 2, data.flip, lambda: m) for s in seeds)
    return iter(Stacked(orders))


def test_x0_is_a_draw_of_the_posterior(made):
    data = attach(Latents(made))
    moments, labels = data.split("train")
    draws = [draw for draw, _ in zip(stream(data), range(500))]
    found = batches(data, draws)
    assert found[0].x0.dtype == torch.float32 and found[0].x0.shape == (4, 4, 8, 8)
    chosen = torch.cat([moments[d.index, d.flip.long()] for d in draws]).double()
    z = torch.cat([batch.x0 for batch in found]).double() / 0.18215 + SHIFT
    eps = (z - chosen[:, 0]) / chosen[:, 1]
    n = eps.numel()
    assert abs(eps.mean()) < 5 / n**0.5 and abs(eps.var() - 1) < 5 * (2 / n) ** 0.5
    assert all(torch.equal(batch.y, labels[batch.index]) for batch in found)


def test_a_picture_is_drawn_anew_each_time_and_the_same_in_a_resumed_run(made):
    data = attach(Latents(made, flip=False))
    found = batches(data, (draw for draw, _ in zip(stream(data), range(10))))
    again = batches(data, (draw for draw, _ in zip(stream(data, m=6), range(4))))
    for a, b in zip(found[6:], again):
        assert torch.equal(a.x0, b.x0)
    first = torch.cat([batch.x0 for batch in found])[torch.cat([b.index for b in found]) == 0]
    assert len(first) > 2 and len(first.unique(dim=0)) == len(first)
    index = torch.arange(4)
    ranks = [next(stream(data, rank=rank))._replace(index=index) for rank in (0, 1)]
    a, b = batches(data, ranks)
    assert not torch.equal(a.x0, b.x0)


def test_seeds_side_by_side_draw_what_each_would_alone(made):
    data = attach(Latents(made))
    (both,) = batches(data, [next(stream(data, seeds=(7, 8)))])
    alone = batches(data, [next(stream(data, seeds=(seed,))) for seed in (7, 8)])
    assert torch.equal(both.x0, torch.cat([batch.x0 for batch in alone]))


def test_latents_on_disk_are_those_in_memory(made):
    for training in (True, False):
        resident, mapped = (
            attach(Latents(made, resident=where), training) for where in (True, False)
        )
        loader = resident.train_dataloader() if training else resident.val_dataloader()
        draws = [draw for draw, _ in zip(loader, range(3))]
        assert isinstance(mapped.on_before_batch_transfer(draws[0], 0).moments, torch.Tensor)
        assert resident.on_before_batch_transfer(draws[0], 0) is draws[0]
        for a, b in zip(batches(resident, draws), batches(mapped, draws)):
            assert all(map(torch.equal, a, b))
    other = torch.arange(3)
    assert batches(mapped, [other]) == [other]


def test_a_validation_always_draws_the_same(made):
    whole, parts = (attach(Latents(made, batch_size=b), training=False) for b in (5, 2))
    (a,) = batches(whole, [Draw(torch.arange(5), torch.zeros(5, dtype=torch.bool))])
    b = batches(parts, parts.val_dataloader())  # those of rank 0 of 2
    assert torch.equal(a.x0[::2], torch.cat([batch.x0 for batch in b]))
    assert not torch.allclose(a.x0, whole.scaled(whole.split("validation")[0]), atol=1e-3)


def test_identity_tells_latents_apart(made, pictures, weights, tmp_path):
    ours = Latents(made).identity()
    assert ours == Latents(shutil.copytree(made, tmp_path / "copy"), batch_size=3).identity()
    assert ours == json.loads(json.dumps(ours)) and ours["n"] == 10 and ours["shape"] == [4, 8, 8]
    theirs = Latents(make(pictures, tmp_path / "b", weights, "another")).identity()
    assert theirs["scale"] != ours["scale"] and theirs["digest"] != ours["digest"]
    latents(pictures, tmp_path / "c", DiffusersKL(weights / "kl", scale=0.5), SIZE)
    assert Latents(tmp_path / "c").identity()["scale"]["factor"] == 0.5
    described = build(describe(Latents(made, flip=False)), Data)
    assert isinstance(described, Latents) and not described.flip


# --- training, drawing, judging ---


@pytest.fixture(scope="module")
def fit(made, tmp_path_factory):
    """Runs ``fit`` for three steps on the latents of a folder; its exit code, and the job's."""
    root = tmp_path_factory.mktemp("runs")

    def run(at=made):
        data = {"class_path": "expertdiff.data.latents.Latents"}
        data["init_args"] = {"root": str(at), "batch_size": 4}
        words = [*TINY, f"--data={json.dumps(data)}", f"--study.root={root}"]
        words += ["--model.network.in_channels=4", "--model.network.num_classes=2"]
        words += ["--model.partition.edges=[0,1]", "--trainer.max_steps=3"]
        return main(["fit", *words]), root / "tiny/expert-0"

    return run


@pytest.fixture(scope="module")
def bundle(fit, tmp_path_factory):
    """A class-conditional model of the latents."""
    code, run = fit()
    assert code == 0
    output = tmp_path_factory.mktemp("bundle") / "b"
    return Bundle.stitch([run], output, allow_unfinished=True).folder


def test_another_autoencoder_does_not_go_on_with_a_training(
    bundle, fit, pictures, weights, tmp_path, capsys
):
    other = make(pictures, tmp_path / "b", weights, "another")
    assert fit(other)[0] == 2
    assert "data.scale.autoencoder" in capsys.readouterr().err


def test_samples_are_decoded(bundle, weights, tmp_path):
    words = [bundle, "--samples=6", "--sampler.class_path=DDIM", "--sampler.init_args.steps=3"]
    words += ["--sampler.init_args.clip=false", f"--output={tmp_path}"]
    assert main(["sample", *map(str, words)]) == 0
    images, labels = load_npz(tmp_path / "samples.npz")
    assert images.shape == (6, 3, SIZE, SIZE) and labels.max() < 2
    assert (tmp_path / "samples.png").is_file()
    noise = SampleNoise(0, range(6), (4, 8, 8), "cpu")
    x0 = DDIM(3, clip=False)(Bundle.load(bundle).denoiser, noise, labels)
    expected = ((DiffusersKL(weights / "kl").decode(x0) + 1) * 127.5 + 0.5).clamp(0, 255).byte()
    assert torch.equal(images, expected)


def test_samples_are_judged_as_images(bundle, made, pictures, weights, tmp_path, capsys):
    def test(root):
        config = tmp_path / "config.yaml"
        sampler = {"class_path": "DDIM", "init_args": {"steps": 3, "clip": False}}
        settings = {"sampler": sampler, "judge": "Pixels", "samples": 8, "seeds": [0]}
        model = {"bundle": str(bundle), "evaluation": settings, "output": str(tmp_path / "out")}
        data = {"class_path": "expertdiff.data.latents.Latents", "init_args": {"root": str(root)}}
        trainer = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
        blocks = {"class_path": "expertdiff.methods.stitched.Stitched", "init_args": model}
        config.write_text(json.dumps({"model": blocks, "data": data, "trainer": trainer}))
        return main(["test", "--config", str(config)])

    assert test(made) == 0
    told = json.loads((tmp_path / "out/metrics.json").read_text())
    assert told["metric"] == "FD-pixels" and told["reference_samples"] == 5
    assert told["data_sha256"] == Latents(made).identity()["digest"]
    assert test(make(pictures, tmp_path / "b", weights, "another")) == 2
    assert "was trained on data of scale" in capsys.readouterr().err


def test_what_latents_do_not_have_is_refused(bundle, made):
    with pytest.raises(ValueError, match="set clip to false"):
        Stitched(bundle, Evaluation(DDIM(3)))
    with pytest.raises(ValueError, match="likelihood is not that of their images"):
        likelihood(bundle, Latents(made), samples=2)


def test_another_autoencoder_in_its_place_is_refused(made, weights, tmp_path):
    identity = Latents(made).identity()
    moved = json.loads(json.dumps(identity))
    moved["autoencoder"]["init_args"]["path"] = str(weights / "another")
    assert kind(identity).sampler().clip is False
    with pytest.raises(ValueError, match="another.* is not the autoencoder of these latents"):
        kind(moved)
    moved["autoencoder"]["init_args"]["path"] = str(tmp_path)
    with pytest.raises(ValueError, match="cannot load"):
        kind(moved)
