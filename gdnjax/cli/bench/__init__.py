"""gdnjax bench: what is measured of an engine or of a server. main.py is the command; each of its own has a module."""
