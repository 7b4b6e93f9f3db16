"""What the benchmark suites share: shapes, rivals, timing and targets."""
