"""A trial from its config to its result row, groups of trials, and sweeps."""
