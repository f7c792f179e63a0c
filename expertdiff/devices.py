"""Where to compute, where nobody says it."""

import torch


def accelerator() -> str:
    """As Lightning chooses it, but for Apple's GPUs, which have no float64."""
    return "cpu" if torch.backends.mps.is_available() else "auto"


def default_device() -> torch.device:
    """The first GPU, if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
