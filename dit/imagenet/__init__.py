"""What needs somebody else's weights: the VAE, Inception, published checkpoints."""
