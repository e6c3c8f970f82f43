"""Pure functions of tensors: advantages, losses, KL, weights. Nothing here imports the rest of `rl`."""
