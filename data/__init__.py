"""Values: what the other floors read, compute and hand on. No torch, no sockets, no clocks."""
