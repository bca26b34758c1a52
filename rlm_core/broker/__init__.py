"""Every LM call of a run goes through here: policy, budget, journal, client, usage."""
