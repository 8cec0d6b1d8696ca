"""Pretrained models: where they come from, how their files become weights, and saving them."""
