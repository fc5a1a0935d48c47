"""The embedded small VAEs: their training, and their weights in `assets`."""
