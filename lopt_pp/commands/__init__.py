"""The verbs of `lopt-pp`, one file each: its flags, one call into the room that does the work, and what it prints.

May know every room; nothing imports it.
Start at `lopt_pp.cli`, which finds the verb, and then at the verb's own file.
"""
