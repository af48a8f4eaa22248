"""Training: a recipe, one loop, and what makes it fast on ordinary CPUs."""
