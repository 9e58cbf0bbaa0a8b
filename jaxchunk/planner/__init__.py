"""What to run where: layouts, chunks and memory, before anything runs."""
