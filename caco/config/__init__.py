"""Settings before anything runs: the schema, how a command line is composed, and every refusal that needs neither torch
nor data.

Not here: what the settings build (caco/engine/assembly.py). Nothing here imports torch or a component."""
