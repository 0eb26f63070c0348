"""Prefix caching of training stages."""
