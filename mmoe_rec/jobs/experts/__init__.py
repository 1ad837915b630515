"""What commands do with the experts of a trained model."""
