"""Models of other programs, read as ours."""
