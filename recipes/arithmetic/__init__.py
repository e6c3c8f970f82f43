"""The embedded task: a tiny language model, reasoning-gym problems, reasoning-gym's verifiers."""
