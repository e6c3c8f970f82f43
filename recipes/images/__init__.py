"""The embedded image task: a tiny conditional diffusion model of handwritten digits."""
