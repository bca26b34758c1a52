"""`make bench`: our figures beside those of `rlms`, in one run, as ratios."""
