"""The commands, one file each: what typer shows of a command, and whom it hands its options to. It decides nothing.

A command imports what it runs when it is called, so that `--help` needs neither torch nor grpc.
"""
