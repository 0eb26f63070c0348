"""Metrics, reports and figures of counters; torch and numpy only."""
