"""Tests of the nodes in a real ComfyUI."""
