"""Which number of segments, which recipe: measured at equal cost."""
