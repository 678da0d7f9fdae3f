"""What fits a card, to the byte, from a checkpoint's headers alone."""
