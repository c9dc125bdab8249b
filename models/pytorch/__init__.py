"""Checkpoints of the public PyTorch rectified flows, read and written."""
