"""What is trained: a model and its loss. The training loop knows no more of them than the
protocol.
"""
