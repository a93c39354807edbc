"""Audio backbones (spectrogram transformers), their methods and the audio features they need."""
