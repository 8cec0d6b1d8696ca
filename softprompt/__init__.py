"""Prompt tuning as a scaling study: a frozen language model, a few trained vectors, and sweeps."""

__version__ = "0.1.0"
