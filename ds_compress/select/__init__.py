"""Which weights stay: scores, patterns, schedules, exact selection and 1-bit masks. Pure functions on fragments."""
