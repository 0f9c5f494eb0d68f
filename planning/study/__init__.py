"""Studies of serving on instances that come and go: traces × systems × seeds → outcomes."""
