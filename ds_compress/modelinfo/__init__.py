"""What is known of a model before anything is changed: kinds of layers, names, adapters."""
