"""The comparison with SpotServe and its baselines on its own traces, and on truly bursty arrivals."""
