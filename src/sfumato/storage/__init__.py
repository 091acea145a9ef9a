"""Checkpoints and run directories, and the atomic writes by which they reach the disk."""
