"""What a search among images found, as a page."""
