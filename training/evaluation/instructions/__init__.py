"""Measurements of instruction following: answers against references, and pairs of answers before a judge."""
