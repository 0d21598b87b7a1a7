"""A trained network in use: images to codes, banks, searches and paintings."""
