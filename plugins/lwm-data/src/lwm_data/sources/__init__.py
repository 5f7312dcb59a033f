"""What rows are made of: one file a kind of source."""
