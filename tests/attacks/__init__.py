"""The attack catalogue: cells that try to get out, each with a control that shows that they would."""
