"""Counts of what survives: kills, damage, other world sizes, bad numbers, bad JSON, full disks, tampering."""
