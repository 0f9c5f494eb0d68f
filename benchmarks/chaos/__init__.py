"""Random disturbances of a real fleet, and every stream held against the undisturbed run.

`python -m benchmarks.chaos --seeds 200 --hard --jobs 2 --out DIR`
"""
