"""What is kept on disk and how it gets there whole: checkpoints and run directories."""
