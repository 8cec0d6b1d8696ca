"""Trials, from a config to a result row, groups of concurrent trials, and sweeps."""
