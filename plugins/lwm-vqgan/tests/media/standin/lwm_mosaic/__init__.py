"""A stand-in encoder for tests, in NumPy: small, exact and quick."""
