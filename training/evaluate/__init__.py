"""Measurements of adapters and VAEs, and their reports."""
