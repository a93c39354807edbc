"""Vision backbones (ViT, Swin) and methods that were made for them, one file each."""
