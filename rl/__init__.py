"""How the policy learns: advantages, weights, losses and the trainer around them."""
