"""Rich diversity for diffusion transformers."""
