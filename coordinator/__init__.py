"""Introduces, watches and shows: bootstrap, monitor, page. Never on the data path; imports no torch of its own."""
