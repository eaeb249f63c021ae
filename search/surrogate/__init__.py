"""The surrogate sampler: a Gaussian process a metric, and the candidate that promises most.

What an Optuna sampler sees as a list of parameters is here what a candidate makes of the model:
which blocks stay, how wide each channel group is, by which criterion. Parameters that change
nothing (the widths inside a dropped block) do not exist in that description.
"""
