"""Code that is copied beside exported students, so that it imports nothing of this project."""
