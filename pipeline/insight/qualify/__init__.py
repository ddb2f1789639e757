"""`pipeline qualify`: is this node fit to train, and are this project's claims about GPUs true on it?

Each part runs in a process of its own with a limit of its own, so a crash or a hang is a row of the result.
"""
