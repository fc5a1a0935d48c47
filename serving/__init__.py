"""What hosts and pipelines hold: the served VAE, latent files, clips, metrics, and one reader and writer of videos."""
