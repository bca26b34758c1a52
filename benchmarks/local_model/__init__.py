"""Root and sub-LM are a real small model on this machine: how many small tasks does it solve with our
library, and how many with `rlms` on the same server? `make test-local-model`."""
