"""Latent-to-latent adapters: spaces, networks, files, and HybridVAE."""

from .adapter import LatentAdapter
from .files import load_adapter, save_adapter
from .hybrid import HybridVAE
from .spaces import LatentSpace, latent_space

__all__ = ["HybridVAE", "LatentAdapter", "LatentSpace", "latent_space", "load_adapter", "save_adapter"]
