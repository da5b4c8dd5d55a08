"""Types, defaults and checks of every configuration key, and the identity of a run. Never imports torch."""
