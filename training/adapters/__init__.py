"""Training of adapters on latent pairs: the closed form, the recipe, the training loop."""
