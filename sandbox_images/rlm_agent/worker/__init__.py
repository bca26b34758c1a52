"""Runs cells. Standard library only: gRPC does not survive a fork, and the fork is the transaction."""
