"""gRPC on the public port: triptych.v1, vllm.grpc.engine, health. Translation only."""
