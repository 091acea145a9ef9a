"""Layers that networks share. Tensors in, tensors out: no noise levels, no conditions, no files."""
