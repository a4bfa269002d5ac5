"""Skipping in transformer blocks: configuration, runs of blocks, and the patch of whole models."""
