"""What musubi-tuner reads and writes: dataset configs, and caches of latents."""
