"""Where code can run: one file per environment, found through the entry points `rlm.environments`."""
