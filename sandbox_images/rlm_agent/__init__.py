"""What goes into a sandbox: the agent, its supervisor and the workers that run cells.

Imports nothing here, so that a worker, which must stay free of gRPC, can import its own package.
"""

__version__ = "0.1.0"
