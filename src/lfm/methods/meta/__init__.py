"""meta: learning to adapt."""
