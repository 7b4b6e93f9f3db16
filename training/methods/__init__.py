"""Training objectives and curricula."""
