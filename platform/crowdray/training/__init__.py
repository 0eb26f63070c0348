"""The training method: losses, stages, the loop, checkpoints; torch only, in one process or in many."""
