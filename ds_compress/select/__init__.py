"""Which weights are kept: scores, patterns, schedules and exact selection. Pure functions on fragments.

scores, unit_scores   one class per method, for single weights and for units of prunable groups
score_training        the optimizer settings of learned scores
patterns              unstructured, NxM blocks, N:M groups
schedules             when a mask is computed, and how dense it is then
radix                 exact distributed top-k over selection groups
moving                the same in one pass, where the last threshold says where the next one is
units                 sums over units, and element masks from masks of units
"""
