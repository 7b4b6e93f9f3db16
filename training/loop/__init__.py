"""The training loop: settings, trainer, schedules, checkpoints and reports."""
