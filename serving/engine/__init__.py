"""The compact torch engine: it owns the geometry of weights and KV, so that both can be moved."""
