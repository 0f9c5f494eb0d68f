"""Random disturbances of a real fleet, and every stream held against the undisturbed run.

`python -m benchmarks.chaos --seeds 50 --out DIR`
"""
