"""Text, vision, needle and copying sources, masked packing and the training feed."""
