"""Pieces that several multimodal methods share."""
