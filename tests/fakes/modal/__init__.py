"""Modal's service on loopback: service.py has the whole."""
