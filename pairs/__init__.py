"""Pair sets: what a pair starts from (plan), its files (npz), and their reading as a shuffled stream (reader)."""
