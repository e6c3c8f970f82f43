"""Rollouts in which a model calls tools: the loop, tools, environments with state, and search."""
