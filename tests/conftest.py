"""One tiny study, trained once for the whole session, and the ways to run the program."""

from pathlib import Path

import pytest
import torch

from expertdiff.cli import main

ROOT = Path(__file__).parents[1]
CONFIG = ["--config", str(ROOT / "configs/digits/mdm.yaml")]
TINY = [*CONFIG, "--config", str(ROOT / "tests/conf/tiny.yaml")]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def fit(tmp_path):
    """Runs ``fit`` on the tiny config under tmp_path; returns the exit code."""

    def run(*options: str) -> int:
        return main(["fit", *TINY, f"--study.root={tmp_path}", *options])

    return run


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """The folder of a launched tiny study."""
    root = tmp_path_factory.mktemp("runs")
    assert main(["launch", *TINY, f"--study.root={root}"]) == 0
    return root / "tiny"
