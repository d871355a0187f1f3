"""What turns pixels into embeddings: the model's own tower, and stand-ins for it. One file each (`Encoder`)."""
