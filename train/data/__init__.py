"""Data that training runs read."""
