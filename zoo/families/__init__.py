"""What families of several modalities share: blocks of one library that stand in networks of many kinds."""
