"""Two stages with a slow link between them."""
