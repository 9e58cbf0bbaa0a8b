"""Inside the paged attention kernel for Hopper GPUs."""
