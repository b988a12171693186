"""Hugging Face modules with another forward, and the one reader of PEFT's attributes."""
