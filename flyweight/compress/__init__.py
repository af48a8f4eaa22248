"""From a trained network to a smaller file that answers as it did."""
