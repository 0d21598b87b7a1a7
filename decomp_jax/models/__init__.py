"""The network: encoder, vector quantisation, segmentation decoder and SPADE image decoder."""
