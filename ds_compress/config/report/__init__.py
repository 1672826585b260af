"""What a plan says of itself: its table, its predicted bytes."""
