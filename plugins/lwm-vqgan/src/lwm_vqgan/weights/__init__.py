"""Weights of a VQGAN: our own folders, and the two forms in which the public ones come."""
