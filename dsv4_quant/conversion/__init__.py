"""Checkpoint in, checkpoint out.

request     what the user asks for
plan        every output file and every step, before a byte is written
operations  what a step does to a panel of rows, and what it proves
configs     the config.json and index that the output needs
files       output files, hashed in order while they are written
journal     what is safely on disk: a second run continues from there
run         validate all, stream, finish
"""
