"""Real models and labelled text for the demo and the benchmarks, and the training script that both run."""
