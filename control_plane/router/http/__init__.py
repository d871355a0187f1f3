"""HTTP: the public and the operator's port, from sockets to calls, and what describes them."""
