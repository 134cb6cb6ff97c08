"""Models of VisBioFusion."""
