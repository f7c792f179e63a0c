"""Images as latents: encoded once, kept on disk, decoded before they are judged."""

from expertdiff.data.latents.encoders import Autoencoder, DiffusersKL, Tiny
from expertdiff.data.latents.module import Latents
from expertdiff.data.latents.verb import latents

__all__ = ["Autoencoder", "DiffusersKL", "Latents", "Tiny", "latents"]
