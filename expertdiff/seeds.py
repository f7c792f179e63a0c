"""Randomness as a function of what it is for, so that nothing has to be restored on resume."""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """The 63-bit seed of a key such as ``(seed, "noise", expert, rank, micro_batch)``.

    Stable over processes and Python versions (unlike ``hash``): SHA-256 of the key's text.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A fresh generator on `device`, seeded by the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def reseed(device: torch.device, *key: int | str) -> None:
    """Seeds the global generator of one device, which dropout draws from.

    `torch.manual_seed` would queue a call, with a formatted stack trace, for every kind of device
    that is not there: a hundred times as slow, and a little memory that is never freed.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed_of(*key))
    else:
        torch.get_device_module(device).manual_seed(seed_of(*key))
