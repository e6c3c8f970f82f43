"""What differs by kind of policy: language models and diffusion models."""
