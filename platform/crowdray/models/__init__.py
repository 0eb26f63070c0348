"""Backbones, decoders and the counter that combines them; torch only."""
