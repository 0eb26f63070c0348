"""Train, tune and ship crowd counters on a Ray cluster."""
