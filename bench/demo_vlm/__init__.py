"""How the demo model's eyes were trained and how well they see. README.md is the recipe."""
