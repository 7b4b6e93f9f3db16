"""What every higher room builds on: inputs, spans, the encoder and memories."""
