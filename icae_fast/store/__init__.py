"""Stored memories: files, index, local and remote stores, provenance."""
