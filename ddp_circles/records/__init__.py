"""What a run leaves behind, written by rank 0 alone: checkpoints, metrics, the model, pictures, a copy for W&B."""
