"""Backbones, decoders and the counter made of them; torch only."""
