"""Pretrained models: the catalogue, reading their files, and saving them."""
