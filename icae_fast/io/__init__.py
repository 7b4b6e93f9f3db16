"""Files, checkpoints, model hubs and the bundled model."""
