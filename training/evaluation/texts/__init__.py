"""Measurements on held-out texts."""
