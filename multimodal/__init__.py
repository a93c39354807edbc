"""Multimodal backbones (contrastive image-text, encoder-decoders, diffusion transformers) and their methods."""
