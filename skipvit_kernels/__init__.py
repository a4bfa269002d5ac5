"""Fused token-skipping operators for vision transformers."""
