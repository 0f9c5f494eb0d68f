"""The commands of `perennial`, one module per group; each imports what it needs when it runs."""
