"""Interrupts a small training at random, and compares its weights with an undisturbed run's.

``python tests/interruptions.py --interruptions 24 --ranks 2`` trains ADM's network on 8 x 8 digits:
drawn t, shuffled data, dropout, accumulation, validation, checkpoints. Signals of three kinds come
by the clock or inside a save, a validation, an accumulation or an average; each start is a fork of
this process, which has imported everything. Runs follow one another until there have been enough
interruptions. It fails unless every start ends as it should (0 complete, 75 with a checkpoint, or
killed) and raw and averaged weights are those of the undisturbed run, bit for bit.
"""

import argparse
import collections
import functools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from expertdiff import checkpoints
from expertdiff.callbacks.checkpoint import ExactCheckpoint
from expertdiff.callbacks.ema import EMA
from expertdiff.cli import main
from expertdiff.files import sha256_of
from expertdiff.methods.base import Method

ROOT = Path(__file__).parents[1]
STEPS, EVERY, ACCUMULATE = 40, 5, 3
KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)
PLACES = {  # where a signal comes, and how often that place is passed before it does
    "clock": (ExactCheckpoint, "on_train_start", 1),
    "save": (checkpoints, "_check_zip", 2),
    "record": (checkpoints, "write_json", 2),
    "validation": (Method, "validation_step", 3),
    "accumulation": (Method, "training_step", 24),
    "average": (EMA, "on_train_batch_end", 24),
}


def arm(place, number, draw, alone):
    """In a forked child: a signal to itself, at that place."""
    kill = functools.partial(os.kill, os.getpid(), number)
    if place == "clock":
        act = threading.Timer(draw.uniform(0.1, 4), kill)
        act.daemon, kill = True, act.start
        if alone:  # else others would wait for a rank that never comes, until the time-out
            return act.start()
    owner, name, most = PLACES[place]
    inner, left = getattr(owner, name), draw.randint(1, most)

    def passed(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            kill()
        return inner(*args, **kwargs)

    setattr(owner, name, passed)


def start(folder, ranks, prepare=lambda rank: None, options=()):
    """Trains in forked children, each prepared; their exit codes, negative for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        code = 99
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            torch.set_num_threads(1)
            ExactCheckpoint.ASK_EVERY = 0.05  # such short steps are never 5 seconds together
            if ranks > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            prepare(rank)
            code = main([*arguments(folder, ranks), *options])
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def arguments(folder, ranks):
    configs = (ROOT / "configs/digits/mdm.yaml", ROOT / "tests/conf/tiny.yaml")
    options = [part for path in configs for part in ("--config", str(path))]
    options += [f"--study.root={folder}", "--model=Diffusion", f"--study.iterations={STEPS}"]
    options += [f"--trainer.accumulate_grad_batches={ACCUMULATE}", "--data.batch_size=4"]
    options += [f"--checkpoint.every_n_steps={EVERY}", "--trainer.val_check_interval=8"]
    if ranks > 1:
        options += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
    return ["fit", *options]


def complete(folder):
    """Whether it was trained to its end, by its record and the checkpoint that this names."""
    job = folder / "tiny" / "baseline"
    if not (job / "done.json").is_file():
        return False
    record = json.loads((job / "done.json").read_text())
    path = checkpoints.checkpoint_path(job / "checkpoints", STEPS)
    return record["step"] == STEPS and record["sha256"] == sha256_of(path)


def weights(folder):
    path = checkpoints.checkpoint_path(folder / "tiny" / "baseline" / "checkpoints", STEPS)
    content = checkpoints.load(path)
    return [content[kind] for kind in (checkpoints.AVERAGED, checkpoints.RAW)]


def interrupted_start(folder, ranks, draw):
    place, number = draw.choice(list(PLACES)), draw.choice(KINDS)
    victim = draw.randrange(ranks)

    def prepare(rank):
        if rank == victim:
            arm(place, number, draw, ranks == 1)

    return place, number, start(folder, ranks, prepare)


def interrupted_run(folder, ranks, draw, counts):
    """Starts a training until it is complete; counts its interruptions by place and kind."""
    while True:
        place, number, codes = interrupted_start(folder, ranks, draw)
        if set(codes) == {0}:
            assert complete(folder), "exit code 0, but incomplete"
            return
        what = f"{codes} after {signal.Signals(number).name} in {place}; see {folder}.log"
        if number == signal.SIGKILL:  # the other rank cannot go on either
            assert -signal.SIGKILL in codes and 0 not in codes and 75 not in codes, what
        else:
            assert set(codes) == {75}, what
        assert not complete(folder) or number == signal.SIGKILL, what
        counts[f"{signal.Signals(number).name} in {place}"] += 1
        print(f"{counts.total()}: {what}", file=sys.stderr, flush=True)


def interruptions(number, ranks, seed, root):
    """Runs until there were so many; returns how many of which kind, and the number of runs."""
    assert start(root / "whole", ranks) == [0] * ranks, f"see {root / 'whole'}.log"
    expected, counts, runs = weights(root / "whole"), collections.Counter(), 0
    draw = random.Random(seed)
    while counts.total() < number:
        folder, runs = root / f"run-{runs}", runs + 1
        interrupted_run(folder, ranks, draw, counts)
        for ours, theirs in zip(weights(folder), expected):
            for key in theirs:
                assert torch.equal(ours[key], theirs[key]), f"{key} differs in {folder}"
    return counts, runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told, runs = interruptions(given.interruptions, given.ranks, given.seed, Path(folder))
    for what, count in sorted(told.items()):
        print(f"{count:3d}  {what}")
    print(
        f"{told.total()} interruptions of {runs} runs on {given.ranks} process(es), seed "
        f"{given.seed}: all weights bit-equal, none ended with 0 incomplete "
        f"({time.monotonic() - began:.0f} s)"
    )
