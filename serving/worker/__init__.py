"""One long-lived process per device: it outlives every layout it takes part in."""
