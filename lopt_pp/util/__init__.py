"""Small tools that know nothing of training: seeds, threads, files, console lines, code of the user.

Knows errors only.
Each file can be read by itself.
"""
