"""Training a VQGAN on a folder of pictures, in Torch."""
