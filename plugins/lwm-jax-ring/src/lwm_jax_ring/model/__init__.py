"""The Llama that every trainer builds, in flax nnx: the network, its loss, its sharding, its canonical names."""
