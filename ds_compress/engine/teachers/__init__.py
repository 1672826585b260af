"""Who a student learns from, and where their weights are."""
