"""Log-probs against those of other frameworks."""
