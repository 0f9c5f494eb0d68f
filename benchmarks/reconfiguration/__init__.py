"""What a change of layout, a crash and replication cost on a real service: `python -m benchmarks.reconfiguration`.

A client that notes when every token arrives is the judge; the controller's events say where the time went.
"""
