"""Rewards: the contract, built-in functions, reward models, limits on time."""
