"""From a budget to the networks worth training."""
