"""What a student imitates of its teacher: one small class per loss, and what they need recorded in a forward."""
