"""The files of a run, written by rank 0 alone: checkpoints, metrics, the model, pictures, a copy for W&B."""
