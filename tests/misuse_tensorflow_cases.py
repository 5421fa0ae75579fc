"""Misuses of TensorFlow."""
