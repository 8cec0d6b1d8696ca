"""Deltas in the files of other tools: PEFT adapters, arrays of google-research/prompt-tuning."""
