"""What a process does about signals, hangs and output that nobody reads."""
