"""Which images make a batch, and what they are called in it: one module for each kind."""
