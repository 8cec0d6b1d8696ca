"""Serves many tasks with one frozen model: a delta for every row of a batch."""
