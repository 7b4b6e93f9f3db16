"""Measurements of instruction following, and the judge."""
