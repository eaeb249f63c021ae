"""A model, a data set, a criterion and a task for prune-search. Copy it and change it."""
