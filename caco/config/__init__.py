"""Settings before anything runs: the schema, the composition of a command line, and every refusal that needs neither
torch nor data.

Nothing here imports torch or a component. Building the parts from the settings is the task of
caco/engine/assembly.py."""
