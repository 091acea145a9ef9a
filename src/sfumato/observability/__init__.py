"""What a person sees of a run: metrics on disk, a progress bar, images. Nothing here depends on
models.
"""
