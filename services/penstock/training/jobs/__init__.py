"""Jobs: their spec, their states, the scheduler of their workers, and the registration of what they made."""
