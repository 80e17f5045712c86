"""Texts to measure and to calibrate with: documents, lists whose values are asked for, and questions about them."""
