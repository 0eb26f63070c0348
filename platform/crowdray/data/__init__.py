"""Data, in the direction in which it flows: sources, samples, shards, then what training draws from them."""
