"""A training run outside of Ray: its folder, its publication, its outcome."""
