"""Latent-to-latent adapters: spaces, networks, files, and HybridVAE."""

from .files import LatentAdapter, load_adapter, save_adapter
from .hybrid import HybridVAE
from .spaces import LatentSpace, space

__all__ = ["HybridVAE", "LatentAdapter", "LatentSpace", "load_adapter", "save_adapter", "space"]
