"""Latent-to-latent adapters: spaces, networks, files, and HybridVAE."""
