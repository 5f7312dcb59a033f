"""What computes the blocks of attention, behind one contract."""
