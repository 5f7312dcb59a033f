"""The VQGAN: its configuration, its parameters' names and shapes, and the model itself in Torch and in Flax."""
