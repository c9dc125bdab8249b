"""Sets of pairs and of trajectories: plan, manifest, npz (one file), reader, trajectories, workers."""
