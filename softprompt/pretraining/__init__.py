"""Pretraining of small models on text, with the models and the training loop of the library."""
