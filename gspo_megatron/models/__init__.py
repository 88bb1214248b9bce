"""Model families, as data."""
