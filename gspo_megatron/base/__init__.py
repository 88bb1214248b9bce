"""The nouns, errors and protocols that every room uses."""
