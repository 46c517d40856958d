"""What `draw` makes of one cell."""
