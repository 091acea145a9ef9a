"""What a person sees of a run: metrics on disk, a progress bar, pictures. It knows nothing of models."""
