"""What a technique sees of the distributed world. Knows torch.distributed, and no engine."""
