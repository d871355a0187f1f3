"""Images of clients: fetched if the operator allows it, decoded in processes of their own, counted while held."""
