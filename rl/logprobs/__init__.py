"""Log-probabilities of recorded rollouts under a model."""
