"""Programs that measure the service and check it against published cases: `python -m benchmarks.<name>`."""
