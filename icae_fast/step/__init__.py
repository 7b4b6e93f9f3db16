"""The training step: losses, head loss, layer tape and activation budget."""
