"""Layers that networks share. Tensors in, tensors out: no noise levels, conditions or files."""
