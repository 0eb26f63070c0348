"""Train, tune and publish crowd counters on a Ray cluster."""

__version__ = "0.1.0"
