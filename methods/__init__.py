"""What can be done to a model: score, remove, recover, measure. Knows nothing of a search."""
