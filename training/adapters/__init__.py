"""Adapters trained on latent pairs: the closed form, the recipe, the training."""
