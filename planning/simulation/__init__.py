"""What would happen to every request of a trace, without serving it."""
