"""Samplers of work: which prompts are rolled out, how many times each, and where it all went.

Nothing here generates text or images, and nothing here imports anything but NumPy and the standard
library, so the package loads in milliseconds inside any worker. Everything is float64, on the host.
"""
