"""Prunable groups: units of a model that can be removed (rows, heads, channels, layers, hidden entries).

prunable_group   what a group is: its units, and the tensor entries coupled with each of them
find             the groups of a model, by kind: feed_forward, heads, channels, layers, hidden; related: by the JSON
inventory, attention, head_companions, example_inputs   what the finders look up
pruning_plan     which units are kept, and what that means for each tensor
apply_pruning    a model in place; model_config: the sizes in its configs
vanilla_hf       whether transformers without ds_compress would rebuild the pruned model
"""
