"""A run's checkpoints and exported models: one way from a path to weights."""
