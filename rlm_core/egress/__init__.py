"""`network=[…]`: the hosts that code in a sandbox may reach, and the one way to them, which is ours.

The sandbox has no network. Code in it connects to a proxy on its own loopback; the agent passes the bytes up
the stream that the host has opened, and the proxy is here: it decides, looks names up, and connects.
"""
