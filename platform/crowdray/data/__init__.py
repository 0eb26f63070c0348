"""From shards to batches: samples, shards, sampling, image caches, batches, the loader, and targets."""
