"""What a run leaves for people: numbers, pictures, and the record of how they came about."""
