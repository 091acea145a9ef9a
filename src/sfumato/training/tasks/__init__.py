"""Training tasks: a model and its loss. The training loop knows them through the protocol only."""
