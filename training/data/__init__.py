"""From videos to latent pairs, and from pairs to crops."""
