"""The text that both sides score behind an adapter."""

IDS = [7, 300, 12, 45, 45, 2, 319, 81, 100, 263, 0, 64]
T5_IDS, T5_TARGETS = [7, 30, 12, 45, 45, 2, 81, 64], [0, 5, 9, 33]
TASK = 1  # of a multitask prompt
