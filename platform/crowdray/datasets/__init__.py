"""From published files to shards."""
