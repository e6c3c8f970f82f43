"""The stages of a training step, in the order `rl/step.py` calls them."""
