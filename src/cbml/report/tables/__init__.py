"""What `tabulate` makes of all cells."""
