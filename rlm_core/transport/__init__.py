"""How bytes get to an agent. Every way ends in a gRPC channel; all above it is the same code."""
