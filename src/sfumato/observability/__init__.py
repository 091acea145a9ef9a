"""What a person sees of a run: metrics on disk, a progress bar, images. It knows nothing of
models.
"""
