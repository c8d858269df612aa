"""Commands with a module of their own: options, then what is printed. `frontalis.cli` imports each to register it."""
