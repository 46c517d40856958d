"""What pages of cells and of tables have in common: a change here draws both again."""
