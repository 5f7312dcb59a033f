"""The Llama that every trainer builds, in torch: the network under canonical names, its loss, its sharding."""
