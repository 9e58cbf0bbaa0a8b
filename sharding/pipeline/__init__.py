"""Pipeline parallelism: tables, what they cost, and their executor."""
