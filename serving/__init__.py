"""The online tier: engine, workers, agents, controller and the gRPC API."""
