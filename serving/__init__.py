"""What hosts and pipelines use: HostVAE, latent files, clips, metrics, and the one reader and writer of videos."""
