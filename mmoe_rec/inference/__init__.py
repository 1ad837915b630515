"""From a trained model to ranked candidates: the artifact folder, the Ranker that reads it, and its MLflow model."""
