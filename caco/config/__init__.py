"""Settings before anything runs: the schema, the composition of a command line, and every refusal that needs neither
torch nor data.

Not here: building the parts from the settings (caco/engine/assembly.py). Nothing here imports torch or a component."""
