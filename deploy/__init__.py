"""Launchers: how the same worker command comes to run on one machine, on Ray, on Kubernetes."""
