"""Where to compute, where nobody says it."""

import torch


def default_device() -> torch.device:
    """The first GPU, if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
