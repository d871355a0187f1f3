"""The command line. Importing this package imports nothing else of Triptych's."""
