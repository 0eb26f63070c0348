"""Ablations: arms that differ in their auxiliary tasks, the protocol that compares them, and its records."""
