"""Keys and values of many sequences: pages, who holds them, what is reused."""
