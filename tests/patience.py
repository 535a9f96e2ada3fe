"""How long a test waits for what must happen: for ever, on any machine that still gets things done.

Who waits that long is about to fail. It is below pytest's own limit for a test, which could not say what was missing.
"""

GENEROUS_S = 150.0
