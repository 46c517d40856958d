"""Images: where they come from, what lists and crops are made of them."""
