"""The gRPC face of the service: protobuf, servicers, interceptors, client."""
