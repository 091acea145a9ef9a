"""Denoisers whose posterior means, and whose sampling ODE, are known exactly."""
