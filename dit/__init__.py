"""A minimal trainer of class-conditional Diffusion Transformers (DiT) in JAX and Flax."""
