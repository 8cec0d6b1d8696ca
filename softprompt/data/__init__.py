"""Labelled text: where it comes from, what is asked of it, and how it becomes arrays."""
