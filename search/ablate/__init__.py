"""`prune-search ablate`: the papers' ablation tables on any model and data."""
