"""What evaluation measures: distances between features, the networks of these, straightness."""
