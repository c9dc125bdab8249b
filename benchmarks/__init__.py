"""Measurements against named rivals, and long checks; none of them belongs to the tests."""
