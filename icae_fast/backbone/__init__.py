"""The base model's layer stack over packed rows."""
