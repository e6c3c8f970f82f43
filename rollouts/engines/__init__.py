"""Engines that generate text, the contract they share, and its test."""
