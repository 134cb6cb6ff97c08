"""Pipelines of VisBioFusion."""
