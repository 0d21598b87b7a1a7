"""One scan or picture to the images that the network reads: the same for records, queries and whoever asks next."""
