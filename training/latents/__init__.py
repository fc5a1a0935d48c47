"""Latent files: decode them, make them of videos, and say what they are."""
