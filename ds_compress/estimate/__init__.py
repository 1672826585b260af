"""What a run will hold and send, predicted from shapes and a JSON: no weights, no processes, no DeepSpeed."""
