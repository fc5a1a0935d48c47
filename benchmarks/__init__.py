"""Measurements, side by side in one run: each module prints its table."""
