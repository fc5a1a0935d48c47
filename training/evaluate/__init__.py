"""Adapters and VAEs measured, and what that looks like."""
