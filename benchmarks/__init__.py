"""Measurements against other implementations, side by side in one run: each module prints its tables."""
