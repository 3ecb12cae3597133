"""A finished run to logits, probabilities and labels."""
