"""A stand-in for every kind of plugin that a run needs, in NumPy: small, exact and quick. For tests alone."""
