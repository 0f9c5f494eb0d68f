"""One process per instance: starts its workers, watches for notices, tells the controller."""
