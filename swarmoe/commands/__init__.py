"""One module a command: read its settings, call whoever does the work, answer."""
