"""What a cell is: its recipe, its options, and what makes two cells the same."""
