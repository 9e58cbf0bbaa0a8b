"""Planning sequences into chunks and running them with exact gradients."""
