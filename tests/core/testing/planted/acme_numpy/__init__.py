"""A backend in plain NumPy for the tests of the conformance kit: right by default, wrong in one way on request."""
