"""lwm_jax_ring: LWM on JAX. Importing this package loads neither jax nor flax."""

__version__ = "0.1.0"
