"""Kernels behind one block contract (``lwm_core.attention``): what a rank computes between two transfers."""
