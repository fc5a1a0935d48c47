"""Commands that need no ComfyUI: extract latent pairs from videos, train adapters on them, and measure the adapters."""
