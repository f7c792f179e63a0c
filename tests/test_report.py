"""The report of fake study folders: its words, its numbers, its missing parts, its one file."""

import json
import math
import re
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest
import torch
from PIL import Image

from expertdiff.describe import describe
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM
from expertdiff.report import chain_figure, write_report
from expertdiff.report.study import read_study
from expertdiff.report.verdict import cost, missing, verdict

EDGES = [0, 0.1, 0.8, 1]
ITERATIONS = {"baseline": 1000, "expert-0": 100, "expert-1": 500, "expert-2": 400}
EXPERTS = {name: n for name, n in ITERATIONS.items() if name != "baseline"}


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_study(folder, name="toy", tests=True):
    """A finished study: a baseline and three experts at equal total iterations."""
    intervals = {"baseline": [0, 1]} | {f"expert-{i}": EDGES[i : i + 2] for i in range(3)}
    facts = {
        "name": name,
        "partition": EDGES,
        "process": describe(DiscreteVP(CosineBetas(), 100)),
        "data": {
            "class_path": "expertdiff.data.Toy",
            "shape": [3, 8, 8],
            "scale": 1.0,
            "n": 600,
            "digest": "abc123",
        },
        "iterations": 1000,
        "seed": 7,
        "jobs": {
            job: {"interval": intervals[job], "iterations": n} for job, n in ITERATIONS.items()
        },
    }
    dump(folder / "study.json", facts)
    for job, n in ITERATIONS.items():
        owned = range(3) if job == "baseline" else [int(job[-1])]
        lines = [
            {"step": step, "seconds": step / 10}
            | {f"val/mse/{i}": (1 + 0.02 * i) / (5 + step) ** 0.5 for i in owned}
            | {f"val/vb/{i}": 0.3 / (9 + step) ** 0.5 for i in owned}
            for step in range(n // 10, n + 1, n // 10)
        ]
        (folder / job).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / job / "metrics.jsonl").write_text(text)
        record = {"step": n, "max_steps": n, "seconds": n / 10, "sha256": "f" * 64, "device": "cpu"}
        dump(folder / job / "done.json", record)
    if tests:
        make_test(folder, "baseline", [1.28, 1.31, 1.34], {"baseline": 1000})
        make_test(folder, "stitched", [1.21, 1.23, 1.25], EXPERTS)
    return folder


def make_test(folder, name, values, steps, **changes):
    metrics = {
        "name": name,
        "metric": "FD-pixels",
        "values": values,
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else 0.0,
        "seeds": list(range(len(values))),
        "samples": 500,
        "sampler": describe(DDIM("ddim50")),
        "nfe": 50,
        "calls": [5, 35, 10],
        "reference": "validation",
        "reference_samples": 200,
        "extractor": "pixels",
        "ema_decay": 0.999,
        "data": "abc123",
        "seconds": 12.0,
        "device": "cpu",
        "floor": 0.8,
        "steps": steps,
    }
    dump(folder / "tests" / name / "metrics.json", metrics | changes)
    Image.new("RGB", (64, 32), "red").save(folder / "tests" / name / "grid.png")
