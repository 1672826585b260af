"""From the JSON block and a model to a plan: which block claims which weight."""
