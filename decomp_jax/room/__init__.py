"""The reading room: a page in the browser in which a reader asks."""
