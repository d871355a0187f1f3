"""Who may ask: keys and tenants, what a caller says of itself, TLS."""
