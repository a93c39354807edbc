"""Methods that need no modality, one file each."""
