"""Headless: latent pairs from videos, adapters from pairs, figures and pictures from adapters."""
