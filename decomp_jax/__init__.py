"""Search medical images by anatomy, by lesion, or by both, through decomposed discrete codes."""
