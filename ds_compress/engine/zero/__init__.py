"""What is known of ZeRO: DeepSpeed internals, fragments of masters, whole parameters."""
