"""Rollouts of diffusion models."""
