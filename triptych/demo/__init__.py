"""Pictures drawn by rule, each with a question whose answer is known: what the demo model is trained on and shown."""
